"""Tiny random-weight models of every supported layout, and inputs for them as tensors, offline.

The weights are drawn so that attention is peaky and every token matters: with the usual 0.02
initialisation all tokens look alike and a wrong position or mask would not show.

A prompt is written as a tuple: numbers are runs of text tokens, letters are images, so
`(3, "A", 2, "B", 5)` is three text tokens, image A, two text tokens, image B, five text tokens. The
same letter is the same image and the same tuple the same text in every batch.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import vlmprune
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)
from vlmprune.prune.contract import ClsAttention, Decoder, ModelShape, Tower

Row = tuple[int | str, ...]

ONE: Row = (7, "C", 3)
TWO: Row = (3, "A", 2, "B", 5)
NONE: Row = (9,)
SINGLE = (ONE,)
BATCH = (TWO, ONE, NONE)

VOCAB = 120
PAD, VISION_START, VISION_END, IMAGE, VIDEO = 0, 112, 113, 118, 119
FIRST_WORD, LAST_WORD = 3, 111

DECODER = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}
QWEN_GRIDS = {"A": (1, 8, 12), "B": (1, 6, 10), "C": (1, 8, 8), "D": (1, 12, 12)}
"""Patches of the images (time, height, width): 24, 15, 16 and 36 visual tokens."""


@dataclass(frozen=True)
class Case:
    """One model layout: how to build it, what a method may know of it, and inputs for it."""

    name: str
    build: Callable[[], PreTrainedModel]
    shape: ModelShape
    fixed_positions: bool
    """Whether the rotary positions are two-dimensional, so that only `original` is allowed."""
    qwen: bool

    def model(self, attn_implementation: str = "sdpa") -> PreTrainedModel:
        """A new model with the same weights every time."""
        model = copy.deepcopy(self.reference(attn_implementation))
        if self.qwen:
            model.model.rope_deltas = None  # left there by earlier runs of the reference
        return model

    def reference(self, attn_implementation: str = "sdpa") -> PreTrainedModel:
        """The shared model that nobody patches."""
        return _build(self, attn_implementation)

    def num_tokens(self, image: str) -> int:
        """N of an image."""
        return self.grid(image)[0] * self.grid(image)[1]

    def grid(self, image: str) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image."""
        if self.qwen:
            _, height, width = QWEN_GRIDS[image]
            return height // 2, width // 2
        side = TOWER["image_size"] // TOWER["patch_size"]
        return side, side

    def row_ids(self, row: Row) -> torch.Tensor:
        """Token ids of one prompt (L,), without padding."""
        words = torch.Generator().manual_seed(zlib.crc32(repr(row).encode()))
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(FIRST_WORD, LAST_WORD, (part,), generator=words).tolist()
            else:
                image = [IMAGE] * self.num_tokens(part)
                ids += [VISION_START, *image, VISION_END] if self.qwen else image
        return torch.tensor(ids)

    def inputs(self, rows: Sequence[Row] = SINGLE, padding: str = "left") -> dict:
        """What a processor would give for these prompts, for `model(**x)` and `generate(**x)`."""
        ids = [self.row_ids(row) for row in rows]
        length = max(len(x) for x in ids)
        input_ids = torch.full((len(ids), length), PAD)
        mask = torch.zeros(len(ids), length, dtype=torch.long)
        for b, x in enumerate(ids):
            at = slice(length - len(x), None) if padding == "left" else slice(0, len(x))
            input_ids[b, at], mask[b, at] = x, 1
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        names = images(rows)
        if self.qwen:
            inputs["mm_token_type_ids"] = (input_ids == IMAGE).int()
            if names:
                inputs["image_grid_thw"] = torch.tensor([QWEN_GRIDS[name] for name in names])
        if names:
            pixels = [self.pixels(name) for name in names]
            inputs["pixel_values"] = torch.cat(pixels)
        return inputs

    def pixels(self, image: str) -> torch.Tensor:
        """Pixels of one image, batched over images (LLaVA) or patches (Qwen)."""
        noise = torch.Generator().manual_seed(ord(image))
        if self.qwen:
            patches = torch.tensor(QWEN_GRIDS[image]).prod().item()
            return torch.randn(patches, 3 * 2 * 4 * 4, generator=noise)
        return torch.randn(1, 3, TOWER["image_size"], TOWER["image_size"], generator=noise)


def images(rows: Sequence[Row]) -> list[str]:
    """Letters of the images of a batch, in batch order."""
    return [part for row in rows for part in row if isinstance(part, str)]


@functools.cache
def _build(case: Case, attn_implementation: str) -> PreTrainedModel:
    torch.manual_seed(zlib.crc32(case.name.encode()))
    model = case.build().eval()
    model.set_attn_implementation(attn_implementation)
    # Drawn under one seed whatever the attention, so that implementations can be compared.
    draw = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    for name, weight in model.named_parameters():
        weight.data = _weight(name, weight.shape, draw)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.requires_grad_(False)
    return model


def _weight(name: str, shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=draw)
    if "norm" in name or "ln_q" in name:
        return 1 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    if len(shape) == 1:
        return 0.3 * noise
    if "embed_tokens" in name:
        return noise
    if "position_embedding" in name:
        return 0.7 * noise
    gain = 1.0
    if any(part in name for part in ("q_proj", "k_proj", "attn.qkv")):
        gain = 1.7  # sharp attention
    if "lm_head" in name:
        gain = 3.0  # clear winners
        noise[[IMAGE, VIDEO, VISION_START, VISION_END]] = 0
    fan_in = shape[1:].numel()
    return gain * noise / fan_in**0.5


def _llava(vision, text, **options) -> PreTrainedModel:
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=36,
        **options,
    )
    return LlavaForConditionalGeneration(config)


def _clip_llama() -> PreTrainedModel:
    return _llava(CLIPVisionConfig(**TOWER), LlamaConfig(**DECODER, num_key_value_heads=4))


def _clip_mistral() -> PreTrainedModel:
    text = MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=None)
    return _llava(CLIPVisionConfig(**TOWER), text)


def _clip_mistral_sliding() -> PreTrainedModel:
    text = MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=20)
    return _llava(CLIPVisionConfig(**TOWER), text)


def _siglip_qwen2() -> PreTrainedModel:
    text = Qwen2Config(**DECODER, num_key_value_heads=2)
    vision = SiglipVisionConfig(**TOWER, vision_use_head=False)
    return _llava(vision, text, vision_feature_select_strategy="full", vision_feature_layer=-1)


def _qwen2_5_vl() -> PreTrainedModel:
    text = {
        **DECODER,
        "num_key_value_heads": 2,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 3, 3],
        },
    }
    vision = {
        "depth": 5,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_heads": 4,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "window_size": 16,
        "out_hidden_size": DECODER["hidden_size"],
        "fullatt_block_indexes": [1, 3],
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _shape(**tower) -> ModelShape:
    sizes = {k: DECODER[k] for k in ("hidden_size", "intermediate_size")}
    return ModelShape(
        tower=Tower(num_layers=5, **tower),
        decoder=Decoder(num_layers=DECODER["num_hidden_layers"], **sizes),
    )


CASES = {
    case.name: case
    for case in (
        Case("llava-clip-llama", _clip_llama, _shape(has_cls=True), False, False),
        Case("llava-clip-mistral", _clip_mistral, _shape(has_cls=True), False, False),
        Case("llava-siglip-qwen2", _siglip_qwen2, _shape(has_cls=False), False, False),
        Case(
            "qwen2_5_vl",
            _qwen2_5_vl,
            _shape(has_cls=False, merge_unit=4, full_attention=(1, 3)),
            True,
            True,
        ),
    )
}

SLIDING = Case(
    "llava-clip-mistral-sliding", _clip_mistral_sliding, _shape(has_cls=True), False, False
)
"""Windows shorter than the prompts: tokens drop out of sight, and of the cache."""
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
BOTH_FAMILIES = pytest.mark.parametrize(
    "case", [CASES["llava-clip-llama"], CASES["qwen2_5_vl"]], ids=lambda case: case.name
)
METHODS = pytest.mark.parametrize("name", vlmprune.methods())
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def lacks_signal(case: Case, call) -> bool:
    """Whether the method asks for CLS attention of a tower without CLS."""
    try:
        needs = call.method.needs(case.shape)
    except vlmprune.MissingSignalError:
        return True
    return not case.shape.tower.has_cls and any(isinstance(s, ClsAttention) for s in needs)


def hooks(model) -> list[tuple[int, int, int]]:
    """How many hooks and attributes each module has."""
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(vars(m))) for m in model.modules()
    ]


def patch_or_refusal(model, case: Case, name: str, **options):
    """The handle; or None after the method was refused as it should be."""
    budget = {k: v for k, v in options.items() if k != "positions"}
    call = vlmprune.method(name, **budget)
    if not lacks_signal(case, call):
        return vlmprune.patch(model, name, **options)
    before = hooks(model)
    with pytest.raises(vlmprune.MissingSignalError) as refused:
        vlmprune.patch(model, name, **options)
    message = str(refused.value)
    others = set(vlmprune.methods()) - {name}
    assert any(other in message for other in others), f"names no alternative: {message}"
    assert hooks(model) == before, "a refused patch left hooks"
    return None
