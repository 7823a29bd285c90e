"""Pictures of what was kept."""

from __future__ import annotations

from typing import Literal

from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

_WASH, _FADE = (120, 120, 120), 0.6
_MIN_SIDE = 448


Fit = Literal["crop", "stretch"]
"""How a processor brings a picture to the shape of the token grid."""


def overlay(image: Image.Image, grid: tuple[int, int], kept: Tensor, fit: Fit) -> Image.Image:
    """The image with its dropped tokens faded to grey and a fine line around each kept one.

    Args:
        image: the picture that was asked about.
        grid: rows and columns of its visual tokens.
        kept: (K,) indices of the kept tokens.
        fit: `crop` shows the centre of the picture in the grid's shape, `stretch` all of it.

    Returns:
        An RGB image of at least 448 pixels on its shorter side.
    """
    rows, columns = grid
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
    for index in kept.tolist():
        mask.putpixel((index % columns, index // columns), 1)
    picture = Image.composite(bright, faded, mask.resize(size, Image.Resampling.NEAREST))
    draw = ImageDraw.Draw(picture)
    for index in kept.tolist():
        x, y = index % columns * cell_w, index // columns * cell_h
        draw.rectangle((x, y, x + cell_w - 1, y + cell_h - 1), outline=(255, 255, 255))
    return picture
