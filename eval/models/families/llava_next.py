"""LLaVA-NeXT: a thumbnail and a canvas of crops, a newline a row."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import (
    CLIPVisionConfig,
    GraniteConfig,
    LlavaNextConfig,
    MistralConfig,
    SiglipVisionConfig,
)

from ....prune.errors import MethodFieldError
from ....prune.tiling import Block
from ..family import EvalFamily, Pixels, Shape, noise
from ..tiny_layouts import DECODER, IMAGE, PINPOINTS, SIDE, TOWER, Tiles
from ..tiny_models import Case
from .llava import CLIP, clip, image_token, llama

_PINPOINTS = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]


def _llava_next(vision: Any, text: Any) -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token(text.vocab_size),
        image_grid_pinpoints=_PINPOINTS,
    )


CANVASES = {  # 140, 96, 114 and 192 tokens
    "A": ((30, 48), Block((4, 4), (6, 6), "rows")),
    "B": ((48, 16), Block((6, 6), (4,), "rows")),
    "C": ((24, 50), Block((6,), (3, 6, 3), "rows")),
    "D": ((48, 48), Block((6, 6), (6, 6), "rows")),
}


def _granite(vision: Any, text: Any, layers: list[int], **options: Any) -> LlavaNextConfig:
    """Granite Vision: several layers of SigLIP side by side, and a decoder that scales embeddings,
    attention and residuals by numbers of its own."""
    return LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=layers,
        vision_feature_select_strategy="full",
        **options,
    )


_SCALES = {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "logits_scaling": 8.0}


def _granite_vision() -> LlavaNextConfig:
    """Granite-Vision-3.3-2B at its defaults."""
    vision = SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )
    text = GraniteConfig(
        vocab_size=49156,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=40,
        num_attention_heads=32,
        num_key_value_heads=8,
        attention_multiplier=1 / 64,
        **_SCALES,
    )
    canvases = [[384 * r, 384 * c] for r in range(1, 11) for c in range(1, 11) if r * c <= 10]
    options = {
        "image_token_id": 49155,
        "image_grid_pinpoints": canvases,
        "tie_word_embeddings": True,
    }
    return _granite(vision, text, [-24, -20, -12, -1], **options)


def tiny_granite() -> LlavaNextConfig:
    return _granite(
        SiglipVisionConfig(**TOWER, vision_use_head=False),
        GraniteConfig(**DECODER, num_key_value_heads=2, attention_multiplier=0.5, **_SCALES),
        [-4, -3, -2, -1],
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=SIDE**2,
    )


def tiny_llava_next() -> LlavaNextConfig:
    return LlavaNextConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=None),
        image_token_index=IMAGE,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=SIDE**2,
    )


class LlavaNext(EvalFamily):
    line = "LLaVA"
    wrapper = "llava_hf"
    shapes: ClassVar[tuple[Shape, ...]] = (
        Shape("llava-next-7b", lambda: _llava_next(clip(), llama()), (672, 672)),
        Shape("granite-vision-3.3-2b", _granite_vision, (768, 768)),
    )
    small_shapes: ClassVar[tuple[Shape, ...]] = (
        Shape(
            "llava-next-small",
            lambda: _llava_next(clip(512, 12), llama(1024, 2752, 12, 32000)),
            (672, 336),
        ),
    )
    tiny: ClassVar[tuple[Case, ...]] = (
        Case("llava_next", tiny_llava_next, CLIP, Tiles(CANVASES), checked=True),
    )

    def usual_picture(self, config: Any) -> tuple[int, int]:
        height, width = max(config.image_grid_pinpoints, key=lambda canvas: -canvas[0] * canvas[1])
        return height, width

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        """A thumbnail and a canvas of crops that the picture fills."""
        if list(picture) not in [list(canvas) for canvas in config.image_grid_pinpoints]:
            known = ", ".join(f"{h}x{w}" for h, w in config.image_grid_pinpoints)
            raise MethodFieldError(
                f"A picture of {picture[0]}x{picture[1]}: a canvas of this model is one of {known}."
            )
        side = config.vision_config.image_size
        patches = side // config.vision_config.patch_size
        rows, columns = self.canvas(
            config, patches, *(pixels // side * patches for pixels in picture)
        )
        tiles = 1 + (picture[0] // side) * (picture[1] // side)
        inputs = {
            "pixel_values": noise(device, batch_size, tiles, 3, side, side),
            "image_sizes": torch.tensor([picture] * batch_size),
        }
        return Pixels(patches**2 + rows * (columns + 1), inputs)

    def canvas(self, config: Any, patches: int, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns of tokens of a canvas of `rows` x `columns` patches, `patches` a side of
        a tile."""
        return rows, columns
