"""Pictures of what was kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from ..prune.tiling import Block, Tiling

_WASH, _FADE = (120, 120, 120), 0.6
_MIN_SIDE, _GAP = 448, 12

Fit = Literal["crop", "stretch"]
"""How a processor brings a picture to the shape of the token grid."""


def overlay(pictures: Sequence[Image.Image], tiling: Tiling, kept: Tensor, fit: Fit) -> Image.Image:
    """The image with its dropped tokens faded to grey and a fine line around each kept one.

    Args:
        pictures: the picture that was asked about, or one per frame of a video.
        tiling: how its visual tokens lie; every block (thumbnail and canvas, or frames) gives a
            panel of its own, side by side.
        kept: (K,) numbers of the kept tokens.
        fit: `crop` shows the centre of the picture in the grid's shape, `stretch` all of it.

    Returns:
        An RGB image of at least 448 pixels on its shorter side.
    """
    if len(pictures) not in (1, len(tiling.blocks)):
        raise ValueError(
            f"{len(pictures)} pictures for {len(tiling.blocks)} frames: give one per frame."
        )
    patches = torch.isin(tiling.patches(kept.device), kept)
    per_block = patches.split([block.num_patches for block in tiling.blocks])
    panels = [
        _panel(pictures[i % len(pictures)], block, marks.nonzero()[:, 0].tolist(), fit)
        for i, (block, marks) in enumerate(zip(tiling.blocks, per_block, strict=True))
    ]
    width = sum(panel.width for panel in panels) + _GAP * (len(panels) - 1)
    together = Image.new("RGB", (width, max(panel.height for panel in panels)), "white")
    left = 0
    for panel in panels:
        together.paste(panel, (left, 0))
        left += panel.width + _GAP
    return together


def _panel(image: Image.Image, block: Block, kept: list[int], fit: Fit) -> Image.Image:
    rows, columns = block.rows, block.columns
    if fit == "crop":
        side = min(image.width / columns, image.height / rows)
        image = ImageOps.fit(image, (round(side * columns), round(side * rows)))
    scale = max(1.0, _MIN_SIDE / min(image.size))
    # Whole pixels per token, so that the grid has no seams.
    cell_w = max(1, round(image.width * scale / columns))
    cell_h = max(1, round(image.height * scale / rows))
    size = (cell_w * columns, cell_h * rows)
    bright = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    # Grey and flat, but still readable in dark and in bright pictures.
    faded = Image.blend(bright.convert("L").convert("RGB"), Image.new("RGB", size, _WASH), _FADE)
    mask = Image.new("1", (columns, rows))
    for index in kept:
        mask.putpixel((index % columns, index // columns), 1)
    picture = Image.composite(bright, faded, mask.resize(size, Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(picture)
    for index in kept:
        x, y = index % columns * cell_w, index // columns * cell_h
        draw.rectangle((x, y, x + cell_w - 1, y + cell_h - 1), outline=(255, 255, 255))
    return picture
