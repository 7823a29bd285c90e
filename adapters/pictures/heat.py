"""Numbers of tokens as a heat map over their picture, with a scale."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...prune.tiling import Tiling
from ..family import Fit
from .canvas import GAP, HATCHED, LEGEND, Canvas, Color, canvases, together

_STRENGTH = 185  # of 255: how much of the colour covers the picture
_MAP = "viridis"
_SHADES = 256
_TEXT, _LEAST = 18, 448
_SKEWED = 8.0


def heat_map(
    pictures: Sequence[Image.Image],
    tiling: Tiling,
    values: Tensor,
    fit: Fit,
    *,
    title: str,
    kept: Tensor | None = None,
    limits: tuple[float, float] | None = None,
    across: int | None = None,
) -> Image.Image:
    """The image under the colours of its tokens' values, above a scale that says the least and the
    largest; tokens without a value are grey.

    Where few values are far above the rest, colours follow the ranks of the values, and the scale
    says so and what the middle one is.

    Args:
        pictures, fit, across: as for `overlay`.
        values: (N,), NaN where there is none.
        title: what they are.
        kept: (K,) numbers of tokens to put a fine line around.
        limits: the ends of the scale; None: the least and the largest value.
    """
    values = values.detach().float().cpu()
    known = values[values.isfinite()]
    low, high = limits or ((known.min().item(), known.max().item()) if len(known) else (0.0, 0.0))
    by_rank = limits is None and _skewed(known)
    shades = _ranks(values, known) if by_rank else (values - low) / ((high - low) or 1.0)
    alive = set() if kept is None else set(kept.tolist())
    colors, tokens = _colors(), tiling.patches(values.device).tolist()
    panels, start = [], 0
    drawn = canvases(pictures, tiling.blocks, fit)
    for canvas, block in zip(drawn, tiling.blocks, strict=True):
        here = tokens[start : start + block.num_patches]
        lined = [place for place, token in enumerate(here) if token in alive]
        panels.append(_panel(canvas, shades[here], lined, colors))
        start += block.num_patches
    middle = known.median().item() if by_rank else None
    grey = bool((~shades[tokens].isfinite()).any())
    key = [
        *["colours by rank"] * by_rank,
        *["grey: none"] * grey,
        *["white lines: kept"] * bool(alive),
    ]
    words = [title, "; ".join(key)] if key else [title]
    sheet = _with_scale(together(panels, across), colors, (low, middle, high), words)
    sheet.info[LEGEND] = [HATCHED] * any(canvas.cropped for canvas in drawn)
    return sheet


def _skewed(known: Tensor) -> bool:
    """Whether most values would have nearly the same colour."""
    if len(known) < 8:
        return False
    low, middle, high = known.quantile(torch.tensor([0.0, 0.5, 1.0])).tolist()
    return bool(high - low > _SKEWED * (middle - low))


def _ranks(values: Tensor, known: Tensor) -> Tensor:
    """The share of known values below each, 0 to 1."""
    ordered = known.sort().values
    ranks = torch.searchsorted(ordered, values.nan_to_num()) / max(1, len(known) - 1)
    return ranks.clamp_max(1).where(values.isfinite(), torch.nan)


def _colors() -> list[Color]:
    """From the least to the largest value."""
    from matplotlib import colormaps

    table = colormaps[_MAP](torch.linspace(0, 1, _SHADES).numpy(), bytes=True)
    return [(int(red), int(green), int(blue)) for red, green, blue, _ in table]


def _panel(
    canvas: Canvas, shades: Tensor, lined: Sequence[int], colors: Sequence[Color]
) -> Image.Image:
    """One block, with the shade of each token, 0 to 1."""
    if not len(shades):
        return canvas.shown(canvas.inside)
    known = shades.isfinite()
    numbers = (shades.nan_to_num().clamp(0, 1) * (_SHADES - 1)).round().long().tolist()
    grey = canvas.inside.convert("L").convert("RGB")
    colored = canvas.spread("RGB", [colors[number] for number in numbers])
    heat = Image.blend(grey, colored, _STRENGTH / 255)
    picture = Image.composite(
        heat, canvas.faded(), canvas.spread("L", (255 * known.long()).tolist())
    )
    draw = ImageDraw.Draw(picture)
    for place in lined:
        draw.rectangle(canvas.box(place), outline=(255, 255, 255))
    return canvas.shown(picture)


def _with_scale(
    picture: Image.Image,
    colors: Sequence[Color],
    ends: tuple[float, float | None, float],
    words: Sequence[str],
) -> Image.Image:
    """A bar of the colours below the picture, with the values at its ends and lines of words."""
    size = max(_TEXT, picture.width // 30)
    font = ImageFont.load_default(size)
    low, middle, high = ends
    width = max(picture.width, _LEAST, *(round(font.getlength(one)) for one in words))
    line = size + 6
    height = picture.height + GAP + size + (1 + len(words)) * line
    sheet = Image.new("RGB", (width, height), "white")
    sheet.paste(picture, (0, 0))
    draw, top = ImageDraw.Draw(sheet), picture.height + GAP
    strip = Image.new("RGB", (len(colors), 1))
    strip.putdata(list(colors))
    sheet.paste(strip.resize((width, size), Image.Resampling.NEAREST), (0, top))
    under = top + size + 2
    draw.text((0, under), f"{low:.3g}", "black", font)
    if middle is not None:
        draw.text((width / 2, under), f"{middle:.3g}", "black", font, anchor="ma")
    draw.text((width, under), f"{high:.3g}", "black", font, anchor="ra")
    for number, one in enumerate(words, 1):
        draw.text((0, under + number * line), one, "black", font)
    return sheet
