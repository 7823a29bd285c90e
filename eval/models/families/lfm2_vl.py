"""LFM2-VL: pictures of any size up to 256 tokens, larger ones as tiles and the whole picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from transformers import Lfm2Config, Lfm2VlConfig, Siglip2VisionConfig

from ....prune.errors import MethodFieldError
from ....prune.tiling import Block, Tiling
from ..family import EvalFamily, Pixels, Shape, noise
from ..tiny_layouts import DECODER, IMAGE, TOWER, VISION_END, VISION_START, Plain, Row, images
from ..tiny_layouts import noise as noise_of
from ..tiny_models import Case, tiny_shape

_GRIDS = {"A": ((3, 3), (3, 3), (2, 4)), "B": ((3, 5),), "C": ((4, 4),), "D": ((4, 3),)}
"""Rows and columns of tokens of each picture of an image: tiles, the whole picture last."""
_NAMES = (110, 109, 108)
"""What stands before the pictures of an image of several."""
ATTENTION = (1, 3)


class Sized(Plain):
    """Pictures of any size, padded to the largest of a batch; between marks, and a name before
    each of several."""

    def tiling(self, image: str, alone: bool) -> Tiling:
        blocks = tuple(Block((rows,), (columns,)) for rows, columns in _GRIDS[image])
        return Tiling(blocks, thumbnail=len(blocks) - 1 if len(blocks) > 1 else None)

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        ids, grids = [VISION_START], _GRIDS[image]
        for name, (rows, columns) in zip(_NAMES, grids, strict=False):
            ids += [*([name] if len(grids) > 1 else []), *[IMAGE] * (rows * columns)]
        return [*ids, VISION_END]

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        return padded([part for name in images(rows) for part in self.seen(name)])

    def seen(self, image: str) -> list[tuple[torch.Tensor, tuple[int, int]]]:
        """The patches (P, 3 * 4 * 4) of each picture of an image, and their rows and columns."""
        sizes = [(2 * rows, 2 * columns) for rows, columns in _GRIDS[image]]
        counts = [rows * columns for rows, columns in sizes]
        values = noise_of(image, sum(counts), 3 * TOWER["patch_size"] ** 2)
        return list(zip(values.split(counts), sizes, strict=True))


def padded(pictures: Sequence[tuple[torch.Tensor, tuple[int, int]]]) -> dict[str, Any]:
    """Patches of pictures as the encoder takes them."""
    if not pictures:
        return {}
    patches = [patch for patch, _ in pictures]
    ones = [torch.ones(len(patch), dtype=torch.long) for patch in patches]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "pixel_values": pad(patches, batch_first=True),
        "pixel_attention_mask": pad(ones, batch_first=True),
        "spatial_shapes": torch.tensor([size for _, size in pictures]),
    }


def _lfm2_vl() -> Lfm2VlConfig:
    """LFM2-VL-1.6B: LFM2-1.2B behind SigLIP 2 So400m."""
    text = Lfm2Config(
        hidden_size=2048,
        intermediate_size=12288,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        full_attn_idxs=[2, 5, 8, 10, 12, 14],
    )
    vision = Siglip2VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        vision_use_head=False,
    )
    return Lfm2VlConfig(vision_config=vision, text_config=text)


def _tiny() -> Lfm2VlConfig:
    text = {name: size for name, size in DECODER.items() if name != "max_position_embeddings"}
    kinds = ["full_attention" if n in ATTENTION else "conv" for n in range(len(ATTENTION) * 2)]
    tower = {name: size for name, size in TOWER.items() if name != "image_size"}
    return Lfm2VlConfig(
        vision_config=Siglip2VisionConfig(**tower, num_patches=36, vision_use_head=False),
        text_config=Lfm2Config(
            **text,
            num_key_value_heads=2,
            layer_types=kinds,
            block_multiple_of=16,
            tie_word_embeddings=False,
        ),
        image_token_id=IMAGE,
        projector_hidden_size=56,
        tie_word_embeddings=False,
    )


_SHAPE = tiny_shape(has_cls=False, merge_unit=4)
_DECODER = replace(_SHAPE.decoder, attention_layers=ATTENTION, intermediate_size=64)


class Lfm2Vl(EvalFamily):
    line = "LFM2"
    wrapper = "lfm2_5_vl"  # of the same classes
    shapes: ClassVar[tuple[Shape, ...]] = (Shape("lfm2-vl-1.6b", _lfm2_vl, (512, 512)),)
    tiny = (Case("lfm2_vl", _tiny, replace(_SHAPE, decoder=_DECODER), Sized()),)

    def usual_picture(self, config: Any) -> tuple[int, int]:
        side = 16 * config.vision_config.patch_size * config.downsample_factor
        return side, side

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        side = config.vision_config.patch_size
        unit = side * config.downsample_factor
        if picture[0] % unit or picture[1] % unit:
            raise MethodFieldError(
                f"A picture of {picture[0]}x{picture[1]}: sides must be multiples of {unit}."
            )
        rows, columns = picture[0] // side, picture[1] // side
        inputs = {
            "pixel_values": noise(device, batch_size, rows * columns, 3 * side**2),
            "pixel_attention_mask": torch.ones(batch_size, rows * columns, dtype=torch.long),
            "spatial_shapes": torch.tensor([[rows, columns]] * batch_size),
        }
        return Pixels(rows * columns // config.downsample_factor**2, inputs)
