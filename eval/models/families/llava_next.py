"""LLaVA-NeXT: a thumbnail and a canvas of crops, a newline a row."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import CLIPVisionConfig, LlavaNextConfig, MistralConfig

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
