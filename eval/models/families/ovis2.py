"""Ovis 2: the whole picture and square tiles behind it with a mark between, AIMv2 and Qwen2.5."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from transformers import Ovis2Config, Ovis2VisionConfig, Qwen2Config

from ....prune.tiling import Tiling
from ..family import EvalFamily, Pixels, Shape
from ..tiny_layouts import (
    DECODER,
    IMAGE,
    TOWER,
    VIDEO_END,
    VIDEO_START,
    VISION_END,
    VISION_START,
)
from ..tiny_models import Case, tiny_shape
from .internvl import TILES, SquareTiles, whole_tiles

GRID, COLUMN, ROW = 110, VIDEO_START, VIDEO_END
"""What stands behind the whole picture, behind a tile, and behind the last one of a row."""


class MarkedTiles(SquareTiles):
    """The whole picture first, a mark behind each tile but the last."""

    def tiling(self, image: str, alone: bool) -> Tiling:
        tiling = super().tiling(image, alone)
        return replace(tiling, thumbnail=None if tiling.thumbnail is None else 0)

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        ids, tile = [VISION_START], self.side**2
        for number, start in enumerate(range(0, len(tokens), tile)):
            ids += [(GRID, COLUMN, ROW)[(number - 1) % 3]] * (number > 0)
            ids += tokens[start : start + tile]
        return [*ids, VISION_END]


def _ovis2() -> Ovis2Config:
    """Ovis2-8B: AIMv2-huge and Qwen2.5-7B."""
    text = Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    vision = Ovis2VisionConfig(
        hidden_size=1536,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=12,
        image_size=448,
        vocab_size=65536,
        hidden_stride=2,
    )
    return _config(vision, text, image_token_id=151665)


def _config(vision: Ovis2VisionConfig, text: Qwen2Config, **options: Any) -> Ovis2Config:
    sizes = {"hidden_size": text.hidden_size, "vocab_size": text.vocab_size}
    own = {"tie_word_embeddings": False}
    return Ovis2Config(vision_config=vision, text_config=text, **sizes, **own, **options)


def _tiny() -> Ovis2Config:
    return _config(
        Ovis2VisionConfig(**TOWER, vocab_size=40, hidden_stride=2),
        Qwen2Config(**DECODER, num_key_value_heads=2),
        image_token_id=IMAGE,
        visual_indicator_token_ids=(VISION_START, GRID, COLUMN, ROW, VISION_END),
    )


class Ovis2(EvalFamily):
    line = "Ovis"
    wrapper = "vlmprune"  # lmms-eval has none
    shapes: ClassVar[tuple[Shape, ...]] = (Shape("ovis2-8b", _ovis2, (896, 896)),)
    tiny = (Case("ovis2", _tiny, tiny_shape(has_cls=False, merge_unit=4), MarkedTiles(TILES, 3)),)

    def usual_picture(self, config: Any) -> tuple[int, int]:
        side = config.vision_config.image_size
        return side, side

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        vision = config.vision_config
        side = vision.image_size // vision.patch_size // vision.hidden_stride
        return whole_tiles(picture, self.usual_picture(config), side**2, batch_size, device)
