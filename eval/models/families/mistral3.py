"""Mistral Small 3.1: pictures of any size as one sequence, 2 x 2 patches a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import Mistral3Config, MistralConfig, PixtralVisionConfig

from ....prune.errors import MethodFieldError
from ....prune.tiling import Tiling
from ..family import EvalFamily, Pixels, Shape, noise
from ..tiny_layouts import DECODER, IMAGE, TOWER, VISION_END, VISION_START, Plain, Row, images
from ..tiny_layouts import noise as noise_of
from ..tiny_models import Case, tiny_shape

_SIZES = {"A": (16, 24), "B": (24, 16), "C": (32, 24), "D": (24, 24)}
"""Height and width in pixels, 8 x 8 a token."""


class Rows(Plain):
    """Pictures of any size, padded to the largest; a break behind each row of tokens, and another
    word behind the last one."""

    def tiling(self, image: str, alone: bool) -> Tiling:
        height, width = _SIZES[image]
        return Tiling.single(height // 8, width // 8)

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        columns = _SIZES[image][1] // 8
        ids: list[int] = []
        for at in range(0, len(tokens), columns):
            ids += [*tokens[at : at + columns], VISION_START]
        return [*ids[:-1], VISION_END]

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        if not (names := images(rows)):
            return {}
        sizes = torch.tensor([_SIZES[name] for name in names])
        pixels = torch.zeros(len(names), 3, *sizes.amax(0))
        for number, name in enumerate(names):
            height, width = _SIZES[name]
            pixels[number, :, :height, :width] = self.pixels(name)[0]
        return {"pixel_values": pixels, "image_sizes": sizes}

    def pixels(self, image: str) -> torch.Tensor:
        return noise_of(image, 1, 3, *_SIZES[image])


def _mistral3(
    width: int = 5120, mlp: int = 32768, layers: int = 40, tower: Mapping[str, int] | None = None
) -> Mistral3Config:
    """Mistral-Small-3.1-24B at its defaults."""
    text = MistralConfig(
        vocab_size=131072,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=width // 160,
        num_key_value_heads=8,
        head_dim=128,
        sliding_window=None,
    )
    vision = {"image_size": 1540, "patch_size": 14, **(tower or {})}
    return Mistral3Config(
        vision_config=PixtralVisionConfig(**vision), text_config=text, tie_word_embeddings=False
    )


def _tiny() -> Mistral3Config:
    return Mistral3Config(
        vision_config=PixtralVisionConfig(**{**TOWER, "image_size": 64}),
        text_config=MistralConfig(
            **DECODER, num_key_value_heads=2, head_dim=16, sliding_window=None
        ),
        image_token_index=IMAGE,
    )


class Mistral3(EvalFamily):
    line = "Mistral"
    wrapper = "mistral3_vl"
    shapes: ClassVar[tuple[Shape, ...]] = (Shape("mistral-small-3.1", _mistral3, (1008, 1008)),)
    small_shapes: ClassVar[tuple[Shape, ...]] = (
        Shape(
            "mistral3-small",
            lambda: _mistral3(
                1280,
                4096,
                12,
                {
                    "hidden_size": 512,
                    "intermediate_size": 2048,
                    "num_hidden_layers": 12,
                    "num_attention_heads": 8,
                },
            ),
            (672, 672),
        ),
    )
    tiny = (Case("mistral3", _tiny, tiny_shape(has_cls=False, merge_unit=4, rotary=True), Rows()),)

    def usual_picture(self, config: Any) -> tuple[int, int]:
        side = 36 * config.vision_config.patch_size * config.spatial_merge_size
        return side, side

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        unit = config.vision_config.patch_size * config.spatial_merge_size
        if picture[0] % unit or picture[1] % unit:
            raise MethodFieldError(
                f"A picture of {picture[0]}x{picture[1]}: sides must be multiples of {unit}."
            )
        inputs = {
            "pixel_values": noise(device, batch_size, 3, *picture),
            "image_sizes": torch.tensor([picture] * batch_size),
        }
        return Pixels(picture[0] // unit * (picture[1] // unit), inputs)
