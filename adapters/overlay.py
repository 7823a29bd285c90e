"""Pictures of what was kept."""

from __future__ import annotations

from PIL import Image, ImageDraw
from torch import Tensor

_DIM = 0.25
_MIN_SIDE = 448


def overlay(image: Image.Image, grid: tuple[int, int], kept: Tensor) -> Image.Image:
    """The image with its dropped tokens darkened and a fine line around each kept one.

    Args:
        image: the picture that was asked about; it is stretched onto the token grid, as fixed-size
            vision towers do after cropping.
        grid: rows and columns of its visual tokens.
        kept: (K,) indices of the kept tokens.

    Returns:
        An RGB image of at least 448 pixels on its shorter side.
    """
    rows, columns = grid
    scale = max(1.0, _MIN_SIDE / min(image.size))
    # Whole pixels per token, so that the grid has no seams.
    cell_w = max(1, round(image.width * scale / columns))
    cell_h = max(1, round(image.height * scale / rows))
    size = (cell_w * columns, cell_h * rows)
    bright = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    grey = bright.convert("L").convert("RGB")
    mask = Image.new("L", (columns, rows), round(255 * _DIM))
    for index in kept.tolist():
        mask.putpixel((index % columns, index // columns), 255)
    shade = mask.resize(size, Image.Resampling.NEAREST)
    dimmed = Image.composite(grey, Image.new("RGB", size), shade)
    picture = Image.composite(bright, dimmed, shade.point(lambda value: 255 if value == 255 else 0))
    draw = ImageDraw.Draw(picture)
    for index in kept.tolist():
        x, y = index % columns * cell_w, index // columns * cell_h
        draw.rectangle((x, y, x + cell_w - 1, y + cell_h - 1), outline=(255, 255, 255))
    return picture
