"""Models by their sizes: those of published checkpoints and small ones, with a picture for each.

A shape is a configuration that `transformers` builds with random weights; nothing is downloaded.
Pictures come as the tensors that the family's processor would give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
)

from ...prune.errors import MethodFieldError, UnsupportedModelError, did_you_mean

TEXT_TOKENS = 40
_BEFORE_IMAGE = 5
_FIRST_WORD, _LAST_WORD = 10, 30000

_NEXT_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
_ONEVISION_PINPOINTS = [[384 * r, 384 * c] for r in range(1, 7) for c in range(1, 7)]


@dataclass(frozen=True)
class Shape:
    """A configuration and the picture (height, width in pixels) that is usual for it."""

    name: str
    config: Callable[[], PreTrainedConfig]
    picture: tuple[int, int]


# --- The shapes --------------------------------------------------------------------------------


def _clip(width: int = 1024, layers: int = 24, side: int = 336) -> CLIPVisionConfig:
    """CLIP-L/336 at its defaults."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        image_size=side,
        patch_size=14,
    )


def _siglip(width: int = 1152, layers: int = 26, mlp: int = 4304) -> SiglipVisionConfig:
    """SigLIP-SO400M/384 without its last layer, as LLaVA-OneVision has it, at its defaults."""
    return SiglipVisionConfig(
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // 72 if width % 72 == 0 else width // 64,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )


def _llama(width: int = 4096, mlp: int = 11008, layers: int = 32, vocabulary: int = 32064) -> Any:
    """Vicuna-7B at its defaults."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=4096,
    )


def _qwen2(width: int, mlp: int, layers: int, key_heads: int) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=152000,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=key_heads,
    )


def _llava(vision: Any, text: Any) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=_llava_image(text.vocab_size)
    )


def _llava_image(vocabulary: int) -> int:
    """Vicuna's first new word; a vocabulary without new words lends one."""
    return 32000 if vocabulary > 32000 else 5


def _llava_next(vision: Any, text: Any) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=_llava_image(text.vocab_size),
        image_grid_pinpoints=_NEXT_PINPOINTS,
    )


def _onevision(vision: Any, text: Any) -> LlavaOnevisionConfig:
    return LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=151646,
        video_token_id=151647,
        image_grid_pinpoints=_ONEVISION_PINPOINTS,
    )


def _qwen_ids() -> dict[str, int]:
    return {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
    }


def _qwen2_5_vl(
    width: int = 3584, mlp: int = 18944, layers: int = 28, key_heads: int = 4, depth: int = 32
) -> Qwen2_5_VLConfig:
    """Qwen2.5-VL-7B at its defaults."""
    vision = 1280 if width > 2048 else 640
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": 152064,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 128,
            "num_key_value_heads": key_heads,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [16, 24, 24],
            },
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision,
            "intermediate_size": 3420 * vision // 1280,
            "num_heads": vision // 80,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [depth * (i + 1) // 4 - 1 for i in range(4)],
        },
        **_qwen_ids(),
    )


def _qwen3_vl(
    width: int = 4096, mlp: int = 12288, layers: int = 36, key_heads: int = 8, depth: int = 27
) -> Qwen3VLConfig:
    """Qwen3-VL-8B at its defaults."""
    vision = 1152 if width > 2048 else 576
    return Qwen3VLConfig(
        text_config={
            "vocab_size": 151936,
            "hidden_size": width,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 128,
            "num_key_value_heads": key_heads,
            "head_dim": 128,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [24, 20, 20],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": depth,
            "hidden_size": vision,
            "intermediate_size": 4304 * vision // 1152,
            "num_heads": vision // 72,
            "out_hidden_size": width,
            "patch_size": 16,
            "spatial_merge_size": 2,
            "deepstack_visual_indexes": [8, 16, 24] if depth > 24 else [2, 5, 8],
        },
        **_qwen_ids(),
    )


def _small_text() -> Any:
    return _llama(1024, 2752, 12, 32000)


def mid_size(*, layers: int, width: int, side: int) -> LlavaConfig:
    """A LLaVA of `side` x `side` visual tokens with a CLIP tower of half the decoder's width."""
    vision = CLIPVisionConfig(
        hidden_size=width // 2,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        image_size=side * 14,
        patch_size=14,
    )
    return _llava(vision, _llama(width, round(width * 2.6875), layers, 32000))


_SHAPES = (
    Shape("llava-1.5-7b", lambda: _llava(_clip(), _llama()), (336, 336)),
    Shape("llava-1.5-13b", lambda: _llava(_clip(), _llama(5120, 13824, 40)), (336, 336)),
    Shape("llava-next-7b", lambda: _llava_next(_clip(), _llama()), (672, 672)),
    Shape(
        "llava-onevision-7b", lambda: _onevision(_siglip(), _qwen2(3584, 18944, 28, 4)), (768, 768)
    ),
    Shape("qwen2.5-vl-7b", _qwen2_5_vl, (1008, 1008)),
    Shape("qwen3-vl-8b", _qwen3_vl, (1024, 1024)),
    Shape("llava-small", lambda: mid_size(layers=12, width=1024, side=24), (336, 336)),
    Shape("llava-next-small", lambda: _llava_next(_clip(512, 12), _small_text()), (672, 336)),
    Shape(
        "llava-onevision-small",
        lambda: _onevision(_siglip(576, 12, 2152), _qwen2(1024, 2752, 12, 4)),
        (384, 384),
    ),
    Shape("qwen2.5-vl-small", lambda: _qwen2_5_vl(1024, 2752, 12, 4, 12), (672, 672)),
    Shape("qwen3-vl-small", lambda: _qwen3_vl(1024, 2752, 12, 4, 12), (768, 768)),
)
SHAPES = {shape.name: shape for shape in _SHAPES}


def shape(name: str) -> Shape:
    """The shape of this name.

    Raises:
        MethodFieldError: there is none.
    """
    if name not in SHAPES:
        raise MethodFieldError(f"Unknown shape {name!r}. {did_you_mean(name, list(SHAPES))}")
    return SHAPES[name]


# --- Pictures ----------------------------------------------------------------------------------


def prompt(
    config: PreTrainedConfig,
    picture: tuple[int, int],
    *,
    batch_size: int,
    device: str,
    ragged: bool = False,
) -> dict[str, Tensor]:
    """Prompts of one picture between words, all alike but for the pixels.

    Args:
        picture: height and width in pixels.
        device: of the pixels; what sizes are read from stays on the CPU for `meta`.
        ragged: the last prompt has as many words again before its picture, the first has none of
            these, the others some; padding on the left makes up for them.

    Raises:
        UnsupportedModelError, MethodFieldError: no picture is known for this family, or not of this
            size.
    """
    if config.model_type not in _PICTURES:
        raise UnsupportedModelError(
            f"No picture can be made for {config.model_type!r}, only for {', '.join(_PICTURES)}."
        )
    tokens, framed, inputs = _PICTURES[config.model_type](config, picture, batch_size, device)
    longer = TEXT_TOKENS if ragged else 0
    text = words(config, TEXT_TOKENS + longer, seed=0)
    before = _BEFORE_IMAGE + longer
    image = torch.full((tokens,), config.image_token_id)
    if framed:
        image = torch.tensor([config.vision_start_token_id, *image, config.vision_end_token_id])
    ids = torch.cat([text[:before], image, text[before:]])
    inputs["input_ids"] = ids.repeat(batch_size, 1)
    missing = torch.linspace(longer, 0, batch_size).long()
    inputs["attention_mask"] = (torch.arange(len(ids)) >= missing[:, None]).long()
    if framed:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == config.image_token_id).int()
    if device != "meta":
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    return inputs


def words(config: Any, count: int, *, seed: int) -> Tensor:
    """Random token ids (count,) that are no placeholders."""
    text = getattr(config, "text_config", config)
    names = ("image", "video", "vision_start", "vision_end")
    special = [getattr(config, f"{name}_token_id", None) for name in names]
    known = torch.arange(_FIRST_WORD, min(text.vocab_size, _LAST_WORD))
    usable = known[~torch.isin(known, torch.tensor([i for i in special if i is not None]))]
    draw = torch.Generator().manual_seed(seed)
    return usable[torch.randint(len(usable), (count,), generator=draw)]


_Made = tuple[int, bool, dict[str, Tensor]]
"""Visual tokens of a picture, whether marks stand around it, and the tensors that bring it."""


def _plain(config: Any, picture: tuple[int, int], batch_size: int, device: str) -> _Made:
    side = config.vision_config.image_size
    if picture != (side, side):
        raise MethodFieldError(
            f"A picture of {picture[0]}x{picture[1]}: this model sees {side}x{side} only."
        )
    tokens = (side // config.vision_config.patch_size) ** 2
    return tokens, False, {"pixel_values": _noise(device, batch_size, 3, side, side)}


def _tiles(config: Any, picture: tuple[int, int], batch_size: int, device: str) -> _Made:
    """A thumbnail and a canvas of crops that the picture fills, a newline a row."""
    if list(picture) not in [list(canvas) for canvas in config.image_grid_pinpoints]:
        known = ", ".join(f"{h}x{w}" for h, w in config.image_grid_pinpoints)
        raise MethodFieldError(
            f"A picture of {picture[0]}x{picture[1]}: a canvas of this model is one of {known}."
        )
    side = config.vision_config.image_size
    patches = side // config.vision_config.patch_size
    rows, columns = (pixels // side * patches for pixels in picture)
    most = getattr(config, "vision_aspect_ratio", "").removeprefix("anyres_max_")
    if most.isdigit():
        ratio = (rows * columns / (int(most) * patches**2)) ** 0.5
        if ratio > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
    tiles = 1 + (picture[0] // side) * (picture[1] // side)
    inputs = {
        "pixel_values": _noise(device, batch_size, tiles, 3, side, side),
        "image_sizes": torch.tensor([picture] * batch_size),
    }
    if config.model_type == "llava_onevision":
        inputs["batch_num_images"] = torch.ones(batch_size, dtype=torch.long)
    return patches**2 + rows * (columns + 1), False, inputs


def _packed(config: Any, picture: tuple[int, int], batch_size: int, device: str) -> _Made:
    """Patches of all pictures in one row."""
    vision = config.vision_config
    unit = vision.patch_size * vision.spatial_merge_size
    if picture[0] % unit or picture[1] % unit:
        raise MethodFieldError(
            f"A picture of {picture[0]}x{picture[1]}: sides must be multiples of {unit}."
        )
    rows, columns = (pixels // vision.patch_size for pixels in picture)
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    inputs = {
        "pixel_values": _noise(device, batch_size * rows * columns, values),
        "image_grid_thw": torch.tensor([[1, rows, columns]] * batch_size),
    }
    return rows * columns // vision.spatial_merge_size**2, True, inputs


def _said(picture: tuple[int, int]) -> str:
    return f"A picture of {picture[0]}x{picture[1]}"


_PICTURES: dict[str, Callable[[Any, tuple[int, int], int, str], _Made]] = {
    "llava": _plain,
    "llava_next": _tiles,
    "llava_onevision": _tiles,
    "qwen2_vl": _packed,
    "qwen2_5_vl": _packed,
    "qwen3_vl": _packed,
}


def usual_picture(config: Any) -> tuple[int, int]:
    """A picture for a model that has no shape here."""
    vision = config.vision_config
    if config.model_type in ("llava_next", "llava_onevision"):
        height, width = max(config.image_grid_pinpoints, key=lambda canvas: -canvas[0] * canvas[1])
        return height, width
    if config.model_type == "llava":
        return vision.image_size, vision.image_size
    side = 36 * vision.patch_size * vision.spatial_merge_size
    return side, side


def _noise(device: str, *shape: int) -> Tensor:
    if device == "meta":
        return torch.empty(*shape, device=device)
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))
