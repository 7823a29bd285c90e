"""Tiny random-weight models of every supported layout, and inputs for them as tensors, offline.

The weights are drawn so that attention is peaky and every token matters: with the usual 0.02
initialisation all tokens look alike and a wrong position or mask would not show.

A prompt is written as a tuple: numbers are runs of text tokens, letters are images, so
`(3, "A", 2, "B", 5)` is three text tokens, image A, two text tokens, image B, five text tokens. The
same letter is the same image and the same tuple the same text in every batch. V and W are videos,
for the models that take them; "images" in names below are images and videos.
"""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
import vlmprune
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
from vlmprune.prune.budget import MethodCall
from vlmprune.prune.contract import CacheMethod, Decoder, ModelShape, Tower
from vlmprune.prune.registry import method_class
from vlmprune.prune.tiling import Block, Tiling

Row = tuple[int | str, ...]

ONE: Row = (7, "C", 3)
TWO: Row = (3, "A", 2, "B", 5)
NONE: Row = (9,)
SINGLE = (ONE,)
BATCH = (TWO, ONE, NONE)
MIXED: tuple[Row, ...] = ((3, "D", 2, "W", 4), (2, "V", "B", 1, "W", 1, "A", 3), (4, "V", 3), NONE)
"""Prompts with videos, for models that take them."""

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
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
QWEN_GRIDS = {
    "A": (1, 8, 12),
    "B": (1, 6, 10),
    "C": (1, 8, 8),
    "D": (1, 12, 12),
    "V": (3, 4, 8),
    "W": (2, 6, 6),
}
"""Patches (time, height, width) of images, 24, 15, 16 and 36 visual tokens, and of videos."""

PIXELS = TOWER["image_size"]
SIDE = PIXELS // TOWER["patch_size"]
FRAMES = {"V": 3, "W": 3}
PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72], [72, 24]]
"""Canvases of tiles (height, width in pixels): 1x2, 2x1, 2x2, 1x3 and 3x1 tiles."""


# --- Layouts: what the processors of a family give, and where the tokens lie -------------------


class Plain:
    """LLaVA-1.5: every image is one square of tokens."""

    takes_videos = False

    def tiling(self, image: str, alone: bool) -> Tiling:
        """How the tokens of an image lie; `alone`: no other image in its prompt."""
        return Tiling.single(SIDE, SIDE)

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        """The placeholders of an image and what a processor puts around them."""
        return tokens

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict:
        """All inputs but `input_ids` and `attention_mask`."""
        if not images(rows):
            return {}
        return {"pixel_values": torch.cat([self.pixels(name) for name in images(rows)])}

    def pixels(self, image: str) -> torch.Tensor:
        """One image as the encoder sees it: (1, 3, H, W)."""
        return noise(image, 1, 3, PIXELS, PIXELS)


class Qwen(Plain):
    """Qwen2-VL and 2.5: grids of any size, patches of all images packed, two marks around each."""

    takes_videos = True

    def tiling(self, image: str, alone: bool) -> Tiling:
        frames, height, width = QWEN_GRIDS[image]
        return Tiling((Block((height // 2,), (width // 2,)),) * frames)

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        return [VISION_START, *tokens, VISION_END]

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict:
        inputs = {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            names = [n for n in images(rows) if (n in FRAMES) == (kind == "video")]
            if names:
                inputs[pixels] = torch.cat([self.pixels(name) for name in names])
                inputs[f"{kind}_grid_thw"] = torch.tensor([QWEN_GRIDS[name] for name in names])
        return inputs

    def pixels(self, image: str) -> torch.Tensor:
        """Patches of one image: (P, 3 * 2 * 4 * 4)."""
        return noise(image, torch.tensor(QWEN_GRIDS[image]).prod().item(), 3 * 2 * 4 * 4)


class Qwen3(Qwen):
    """Qwen3-VL: every frame of a video is a run of its own behind a timestamp."""

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        if image not in FRAMES:
            return super().framed(image, tokens)
        frames, framed = QWEN_GRIDS[image][0], []
        for frame in range(frames):
            part = tokens[: len(tokens) // frames]
            framed += [FIRST_WORD + frame, *super().framed(image, part)]
        return framed


class Tiles(Plain):
    """LLaVA-NeXT: a thumbnail and crops; `images`: sizes (height, width), and what is left of the
    canvas of crops."""

    def __init__(self, images: Mapping[str, tuple[tuple[int, int], Block]]) -> None:
        self.images = images

    def tiling(self, image: str, alone: bool) -> Tiling:
        return Tiling((Block((SIDE,), (SIDE,)), self.images[image][1]))

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict:
        found = [(name, alone) for name, alone in _placed(rows) if name not in FRAMES]
        if not found:
            return {}
        pixels = [self.tiles(name, alone) for name, alone in found]
        most = max(map(len, pixels))
        padded = [torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in pixels]
        return {
            "pixel_values": torch.stack(padded),
            "image_sizes": torch.tensor([self.images[name][0] for name, _ in found]),
        }

    def tiles(self, image: str, alone: bool) -> torch.Tensor:
        """The pictures that the encoder sees of one image: (tiles, 3, H, W)."""
        blocks = self.tiling(image, alone).blocks
        count = sum(len(block.row_sizes) * len(block.column_sizes) for block in blocks)
        return noise(image, count, 3, PIXELS, PIXELS)


class TilesAndVideos(Tiles):
    """LLaVA-OneVision: one of several images is plain with one newline; frames are pooled."""

    takes_videos = True

    def tiling(self, image: str, alone: bool) -> Tiling:
        if image in FRAMES:
            side = -(-SIDE // 2)
            frames = [Block((side,), (side,))] * (FRAMES[image] - 1)
            return Tiling((*frames, Block((side,), (side,), "end")))
        if not alone:
            return Tiling((Block((SIDE,), (SIDE,), "end"),))
        return super().tiling(image, alone)

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict:
        inputs = super().extra(rows, ids)
        stills = [sum(name not in FRAMES for name in images([row])) for row in rows]
        if any(stills):  # the processor leaves out rows without images
            inputs["batch_num_images"] = torch.tensor([n for n in stills if n])
        videos = [name for name in images(rows) if name in FRAMES]
        if videos:
            clips = [noise(name, FRAMES[name], 3, PIXELS, PIXELS) for name in videos]
            inputs["pixel_values_videos"] = torch.stack(clips)
        return inputs


def noise(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(ord(name)))


def _placed(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Letters in batch order, and whether each is the only image (not video) of its prompt."""
    found = []
    for row in rows:
        names = images([row])
        alone = sum(name not in FRAMES for name in names) == 1
        found += [(name, alone) for name in names]
    return found


PLAIN, QWEN, QWEN3 = Plain(), Qwen(), Qwen3()
NEXT = Tiles(
    {  # 140, 96, 114 and 192 tokens
        "A": ((30, 48), Block((4, 4), (6, 6), "rows")),
        "B": ((48, 16), Block((6, 6), (4,), "rows")),
        "C": ((24, 50), Block((6,), (3, 6, 3), "rows")),
        "D": ((48, 48), Block((6, 6), (6, 6), "rows")),
    }
)
ONEVISION = TilesAndVideos(
    {  # 114, 96, 102 and 96 tokens where they are alone; C and D are scaled down
        "A": ((24, 50), Block((6,), (3, 6, 3), "rows")),
        "B": ((48, 16), Block((6, 6), (4,), "rows")),
        "C": ((30, 48), Block((3, 3), (5, 5), "rows")),
        "D": ((24, 72), Block((4,), (5, 4, 5), "rows")),
    }
)
ASPECT_RATIO = "anyres_max_2"
"""More than 87 patches are scaled down to 72: as anyres_max_9 does it, on fewer tiles."""


def joined(one: dict, two: dict) -> dict:
    """Images of two calls as those of one; tiles are padded to the same number."""
    found = {}
    for key in one:
        parts = [one[key], two[key]]
        if parts[0].dim() == 5:
            most = max(part.shape[1] for part in parts)
            parts = [
                torch.cat([x, x.new_zeros(len(x), most - x.shape[1], *x.shape[2:])], 1)
                for x in parts
            ]
        found[key] = torch.cat(parts)
    return found


# --- Cases -------------------------------------------------------------------------------------


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
        return [self.tiling(name, alone) for name, alone in _placed(rows)]

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
        return inputs | self.layout.extra(rows, input_ids)


def images(rows: Sequence[Row]) -> list[str]:
    """Letters of the images of a batch, in batch order."""
    return [part for row in rows for part in row if isinstance(part, str)]


def is_visual(ids: torch.Tensor) -> torch.Tensor:
    """Which token ids are placeholders of images or videos."""
    return (ids == IMAGE) | (ids == VIDEO)


def encoder_inputs(inputs: dict) -> dict[str, dict]:
    """The arguments of `get_image_features` and of `get_video_features` among a model's inputs."""
    of = {
        "image": ("pixel_values", "image_sizes", "batch_num_images", "image_grid_thw"),
        "video": ("pixel_values_videos", "video_grid_thw"),
    }
    found = {name: {k: inputs[k] for k in keys if k in inputs} for name, keys in of.items()}
    return {name: given for name, given in found.items() if given}


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


def _qwen(config_class, model_class, text: dict, **vision) -> PreTrainedModel:
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


def _shape(**tower) -> ModelShape:
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
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
FAMILY_NAMES = ("llava-clip-llama", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
FAMILIES = pytest.mark.parametrize(
    "case", [CASES[name] for name in FAMILY_NAMES], ids=lambda case: case.name
)
BOTH_FAMILIES = pytest.mark.parametrize(
    "case", [CASES["llava-clip-llama"], CASES["qwen2_5_vl"]], ids=lambda case: case.name
)
_ALL = vlmprune.methods()
ON_CACHE = [name for name in _ALL if issubclass(method_class(name), CacheMethod)]
METHODS = pytest.mark.parametrize("name", [name for name in _ALL if name not in ON_CACHE])
"""Methods that remove tokens from the sequence."""
CACHE_METHODS = pytest.mark.parametrize("name", ON_CACHE)
SMALL = {"token_select": {"n_init": 1, "n_local": 2}}
"""Fields of methods that do nothing to prompts as short as these, or refuse their budgets."""
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def lacks_signal(case: Case, call) -> bool:
    """Whether the method, as it is, asks for something that the model's encoder does not have."""
    try:
        needs = call.method.needs(case.shape)
    except vlmprune.MissingSignalError:
        return True
    return any(case.shape.lacks(signal) or signal.of_text_twin for signal in needs)


def options_for(case: Case, name: str) -> dict | None:
    """What `patch` needs beside the budget to run a method on a model: nothing; a field that
    replaces the CLS token by attention that every encoder has; the text encoder of the model's
    CLIP. None where the method cannot run."""
    from test_text import clip

    cls = method_class(name)
    choices = [{}, *({f: "received"} for f in ("scores", "pivot") if f in cls().fields())]
    works = (f for f in choices if not lacks_signal(case, MethodCall(cls(**f), None)))
    found = next(works, None)
    if found is None and not any(map(case.shape.lacks, cls().needs(case.shape))):
        return {"clip": clip()}
    return found


def hooks(model) -> list[tuple[int, int, int]]:
    """How many hooks and attributes each module has."""
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(vars(m))) for m in model.modules()
    ]


def patch_or_refusal(model, case: Case, name: str, **options):
    """The handle; or None where the method cannot run and was refused as it should be."""
    needed = options_for(case, name)
    if needed != {}:
        before = hooks(model)
        with pytest.raises(vlmprune.MissingSignalError) as refused:
            vlmprune.patch(model, name, **options)
        message = str(refused.value)
        if needed is None:
            others = set(vlmprune.methods()) - {name}
            assert any(other in message for other in others), f"names no other method: {message}"
        for option, value in (needed or {}).items():  # what would make it work
            word = f"{option}={value!r}" if isinstance(value, str) else f"{option}="
            assert word in message
        assert hooks(model) == before, "a refused patch left hooks"
    if needed is None:
        return None
    return vlmprune.patch(model, name, **needed, **options)
