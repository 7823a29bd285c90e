"""InternVL 3.5: square tiles and a thumbnail behind them, an own ViT and Qwen3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import InternVLConfig, Qwen2Config, Qwen3Config

from ....prune.errors import MethodFieldError
from ....prune.tiling import Block, Tiling
from ..family import EvalFamily, Pixels, Shape, noise
from ..tiny_layouts import DECODER, IMAGE, PIXELS, TOWER, VISION_END, VISION_START, Plain, Row
from ..tiny_layouts import images as images_of
from ..tiny_layouts import noise as noise_of
from ..tiny_models import Case, tiny_shape


class SquareTiles(Plain):
    """Tiles of one size and the whole picture last; `tiles`: how many each image has."""

    def __init__(self, tiles: Mapping[str, int], side: int) -> None:
        self.counts, self.side = tiles, side

    def tiling(self, image: str, alone: bool) -> Tiling:
        count = self.counts[image]
        tile = Block((self.side,), (self.side,))
        return Tiling((tile,) * count, thumbnail=count - 1 if count > 1 else None)

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        return [VISION_START, *tokens, VISION_END]

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        if not images_of(rows):
            return {}
        return {"pixel_values": torch.cat([self.pixels(name) for name in images_of(rows)])}

    def pixels(self, image: str) -> torch.Tensor:
        """Tiles of one image: (tiles, 3, H, W)."""
        return noise_of(image, self.counts[image], 3, PIXELS, PIXELS)


TILES = {"A": 3, "B": 1, "C": 4, "D": 2}


def _internvl(
    width: int = 4096, mlp: int = 12288, layers: int = 36, tower: Mapping[str, int] | None = None
) -> InternVLConfig:
    """InternVL3.5-8B at its defaults: InternViT-300M and Qwen3-8B."""
    text = Qwen3Config(
        vocab_size=151936,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=8,
        head_dim=128,
    )
    vision = {"attention_bias": True, **(tower or {})}
    options = {"image_token_id": 151671, "tie_word_embeddings": False}
    return InternVLConfig(vision_config=vision, text_config=text, **options)


def _tiny() -> InternVLConfig:
    vision = {**TOWER, "image_size": [PIXELS] * 2, "patch_size": [TOWER["patch_size"]] * 2}
    return InternVLConfig(
        vision_config={**vision, "attention_bias": True},
        text_config=Qwen2Config(**DECODER, num_key_value_heads=2),
        image_token_id=IMAGE,
        image_seq_length=9,
    )


class InternVL(EvalFamily):
    line = "InternVL"
    wrapper = "internvl_hf"
    shapes: ClassVar[tuple[Shape, ...]] = (Shape("internvl3.5-8b", _internvl, (896, 896)),)
    small_shapes: ClassVar[tuple[Shape, ...]] = (
        Shape(
            "internvl3.5-small",
            lambda: _internvl(
                1024,
                3072,
                12,
                {
                    "hidden_size": 512,
                    "intermediate_size": 2048,
                    "num_hidden_layers": 12,
                    "num_attention_heads": 8,
                },
            ),
            (448, 448),
        ),
    )
    tiny = (
        Case(
            "internvl",
            _tiny,
            tiny_shape(has_cls=True, merge_unit=4, prefix=1),
            SquareTiles(TILES, 3),
        ),
    )

    def usual_picture(self, config: Any) -> tuple[int, int]:
        height, width = config.vision_config.image_size
        return height, width

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        tile = self.usual_picture(config)
        side = round(tile[0] // config.vision_config.patch_size[0] * config.downsample_ratio)
        return whole_tiles(picture, tile, side**2, batch_size, device)


def whole_tiles(
    picture: tuple[int, int], tile: tuple[int, int], tokens: int, batch_size: int, device: str
) -> Pixels:
    """A picture of whole tiles of so many tokens, and a thumbnail where it is several."""
    if picture[0] % tile[0] or picture[1] % tile[1]:
        raise MethodFieldError(
            f"A picture of {picture[0]}x{picture[1]}: sides must be multiples of "
            f"{tile[0]}x{tile[1]}."
        )
    crops = (picture[0] // tile[0]) * (picture[1] // tile[1])
    tiles = crops + (crops > 1)
    return Pixels(tiles * tokens, {"pixel_values": noise(device, batch_size * tiles, 3, *tile)})
