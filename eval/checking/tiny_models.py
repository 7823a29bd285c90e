"""Tiny random-weight models of every supported layout, and inputs for them as tensors, offline.

The weights are drawn so that attention is peaky and every token matters: with the usual 0.02
initialisation all tokens look alike and a wrong position or mask would not show.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

from ...prune.contract import Decoder, ModelShape, Tower
from ...prune.tiling import Block, Tiling
from .layouts import (
    ASPECT_RATIO,
    DECODER,
    FIRST_WORD,
    FRAMES,
    IMAGE,
    LAST_WORD,
    MROPE,
    NEXT,
    ONEVISION,
    PAD,
    PINPOINTS,
    PLAIN,
    QWEN,
    QWEN3,
    SIDE,
    SINGLE,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    Plain,
    Qwen,
    Row,
    Tiles,
    placed,
)


@dataclass(frozen=True)
class Case:
    """One model layout: how to build it, what a method may know of it, and inputs for it."""

    name: str
    build: Callable[[], PreTrainedModel]
    shape: ModelShape
    layout: Plain = PLAIN
    fixed_positions: bool = False
    """Whether the rotary positions are two-dimensional, so that only `original` is allowed."""

    @property
    def qwen(self) -> bool:
        return isinstance(self.layout, Qwen)

    def model(self, attn_implementation: str = "sdpa") -> PreTrainedModel:
        """A new model with the same weights every time."""
        model = copy.deepcopy(self.reference(attn_implementation))
        if self.qwen:
            model.model.rope_deltas = None  # left there by earlier runs of the reference
        return model

    def reference(self, attn_implementation: str = "sdpa") -> PreTrainedModel:
        """The shared model that nobody patches."""
        return _build(self, attn_implementation)

    def tiling(self, image: str, alone: bool = True) -> Tiling:
        """How the tokens of an image lie, in a prompt where it is the only one or is not."""
        return self.layout.tiling(image, alone)

    def tilings(self, rows: Sequence[Row]) -> list[Tiling]:
        """Those of all images of a batch, in batch order."""
        return [self.tiling(name, alone) for name, alone in placed(rows)]

    def num_tokens(self, image: str, alone: bool = True) -> int:
        """N of an image, newlines included."""
        return self.tiling(image, alone).num_tokens

    def counts(self, rows: Sequence[Row]) -> list[int]:
        """N of all images of a batch, in batch order."""
        return [tiling.num_tokens for tiling in self.tilings(rows)]

    def grid(self, image: str) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image that is one rectangle."""
        (tile,) = self.tiling(image).tiles
        return tile.rows, tile.columns

    def row_ids(self, row: Row) -> torch.Tensor:
        """Token ids of one prompt (L,), without padding."""
        words = torch.Generator().manual_seed(zlib.crc32(repr(row).encode()))
        counts = iter(self.counts([row]))
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(FIRST_WORD, LAST_WORD, (part,), generator=words).tolist()
            else:
                token = VIDEO if part in FRAMES else IMAGE
                ids += self.layout.framed(part, [token] * next(counts))
        return torch.tensor(ids)

    def inputs(self, rows: Sequence[Row] = SINGLE, padding: str = "left") -> dict[str, Any]:
        """What a processor would give for these prompts, for `model(**x)` and `generate(**x)`."""
        ids = [self.row_ids(row) for row in rows]
        length = max(len(x) for x in ids)
        input_ids = torch.full((len(ids), length), PAD)
        mask = torch.zeros(len(ids), length, dtype=torch.long)
        for b, x in enumerate(ids):
            at = slice(length - len(x), None) if padding == "left" else slice(0, len(x))
            input_ids[b, at], mask[b, at] = x, 1
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        return inputs | self.layout.extra(rows, input_ids)


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
    if "image_newline" in name:
        return noise
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


def _llava(vision: Any, text: Any, **options: Any) -> PreTrainedModel:
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


def _llava_next() -> PreTrainedModel:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=SIDE**2,
    )
    return LlavaNextForConditionalGeneration(config)


def _llava_next_wide() -> PreTrainedModel:
    model = _llava_next()
    model.config.image_grid_pinpoints = [[24, 72], [72, 24]]
    return model


def _llava_onevision() -> PreTrainedModel:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=Qwen2Config(**DECODER, num_key_value_heads=2),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        vision_aspect_ratio=ASPECT_RATIO,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _qwen(
    config_class: Any, model_class: Any, text: dict[str, Any], **vision: Any
) -> PreTrainedModel:
    """Decoder and encoder in the sizes of the others; `text` and `vision` are what differs."""
    patches = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    config = config_class(
        text_config={**DECODER, "num_key_value_heads": 2, "rope_parameters": MROPE, **text},
        vision_config={"depth": 5, "num_heads": 4, **patches, **vision},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    return model_class(config)


def _qwen2_vl() -> PreTrainedModel:
    sizes = {"embed_dim": 48, "hidden_size": DECODER["hidden_size"], "mlp_ratio": 2}
    return _qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, {}, **sizes)


def _qwen2_5_vl() -> PreTrainedModel:
    return _qwen(
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        {},
        hidden_size=48,
        intermediate_size=64,
        out_hidden_size=DECODER["hidden_size"],
        window_size=16,
        fullatt_block_indexes=[1, 3],
        # With more, generate() (last position + 1) and forward (rope_deltas) number the first new
        # token differently after a video, also without a patch.
        tokens_per_second=1,
    )


def _qwen3_vl() -> PreTrainedModel:
    return _qwen(
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        {"head_dim": 16},
        hidden_size=48,
        intermediate_size=64,
        out_hidden_size=DECODER["hidden_size"],
        num_position_embeddings=36,
        deepstack_visual_indexes=[1, 2, 3],
    )


def _shape(**tower: Any) -> ModelShape:
    sizes = {k: DECODER[k] for k in ("hidden_size", "intermediate_size")}
    return ModelShape(
        tower=Tower(num_layers=5, **tower),
        decoder=Decoder(num_layers=DECODER["num_hidden_layers"], **sizes),
    )


CLIP = _shape(has_cls=True, text_twin=True)
SIGLIP = _shape(has_cls=False)
MERGING = _shape(has_cls=False, merge_unit=4)
WINDOWED = _shape(has_cls=False, merge_unit=4, full_attention=(1, 3))
CASES = {
    case.name: case
    for case in (
        Case("llava-clip-llama", _clip_llama, CLIP),
        Case("llava-clip-mistral", _clip_mistral, CLIP),
        Case("llava-siglip-qwen2", _siglip_qwen2, SIGLIP),
        Case("llava_next", _llava_next, CLIP, NEXT),
        Case("llava_onevision", _llava_onevision, SIGLIP, ONEVISION),
        Case("qwen2_vl", _qwen2_vl, MERGING, QWEN, fixed_positions=True),
        Case("qwen2_5_vl", _qwen2_5_vl, WINDOWED, QWEN, fixed_positions=True),
        Case("qwen3_vl", _qwen3_vl, MERGING, QWEN3, fixed_positions=True),
    )
}

GONE = Case(
    "llava_next-gone",
    _llava_next_wide,
    CLIP,
    Tiles(
        {
            "A": ((24, 20), Block((6,), (0, 6, 0), "rows")),
            "B": ((30, 24), Block((1, 6, 1), (6,), "rows")),
            "C": ((24, 12), Block((6,), (0, 4, 0), "rows")),
        }
    ),
)
"""Narrow pictures on wide canvases: of some tiles only padding was seen, and nothing is left."""
SLIDING = Case("llava-clip-mistral-sliding", _clip_mistral_sliding, CLIP)
"""Windows shorter than the prompts: tokens drop out of sight, and of the cache."""
