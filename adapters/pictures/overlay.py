"""Pictures of what was kept, and what became of the rest."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torch import Tensor

from ...prune.tiling import Tiling
from ..family import Fit
from .canvas import GREY, HATCHED, LEGEND, OUTLINES, WHITE, Canvas, Color, canvases, together
from .regions import Regions

_TINT = 90  # of 255
_WHITE: Color = (255, 255, 255)


def overlay(
    pictures: Sequence[Image.Image],
    tiling: Tiling,
    kept: Tensor,
    fit: Fit,
    *,
    rows: Tensor | None = None,
    members: Tensor | None = None,
    across: int | None = None,
) -> Image.Image:
    """The image with its dropped tokens faded to grey and a fine line around each kept one.

    Tokens that were merged are a region with an outline of its own (and a tint, where regions are
    scattered), and the token whose place their row has is in a box of the same colour. A token that
    several rows took in is the first one's.

    Args:
        pictures: the picture that was asked about, or one per frame of a video.
        tiling: how its visual tokens lie; every block (thumbnail and canvas, or frames) gives a
            panel of its own.
        kept: (K,) numbers of the kept tokens.
        fit: `crop` frames what the tokens show, the centre of the picture in the grid's shape, and
            dims the rest; with `stretch` they show all of it.
        rows, members: what was merged; see `Regions.of`.
        across: panels beside each other; None: all.

    Returns:
        An RGB image, of each panel of which the tokens take at least 448 pixels on their shorter
        side; its `info["legend"]` lists sentences that say what is seen.
    """
    regions = Regions.of(tiling, kept, rows, members)
    alive = set(kept.tolist())
    tokens = tiling.patches(kept.device).tolist()
    panels, start = [], 0
    drawn = canvases(pictures, tiling.blocks, fit)
    for canvas, block in zip(drawn, tiling.blocks, strict=True):
        panels.append(_panel(canvas, tokens[start : start + block.num_patches], alive, regions))
        start += block.num_patches
    sheet = together(panels, across)
    dropped = any(token not in alive and token not in regions.owner for token in tokens)
    plain = any(token in alive and token not in regions.owner for token in tokens)
    sheet.info[LEGEND] = [
        *[GREY] * dropped,
        *[WHITE] * (plain and (dropped or bool(regions.owner))),
        *[OUTLINES] * bool(regions.owner),
        *[HATCHED] * any(canvas.cropped for canvas in drawn),
    ]
    return sheet


def _panel(canvas: Canvas, tokens: list[int], alive: set[int], regions: Regions) -> Image.Image:
    """`tokens` are the numbers of the panel's tokens in the image."""
    if not tokens:
        return canvas.shown(canvas.inside)
    owners = [regions.owner.get(token) for token in tokens]
    bright = [
        255 * (owner is not None or token in alive)
        for token, owner in zip(tokens, owners, strict=True)
    ]
    picture = Image.composite(canvas.inside, canvas.faded(), canvas.spread("L", bright))
    tints = [
        0 if owner is None or regions.in_one_piece or token in regions.centres else _TINT
        for token, owner in zip(tokens, owners, strict=True)
    ]
    if any(tints):
        colors = [_WHITE if owner is None else regions.colors[owner] for owner in owners]
        picture.paste(canvas.spread("RGB", colors), mask=canvas.spread("L", tints))
    draw = ImageDraw.Draw(picture)
    line = max(2, min(canvas.cell) // 10)
    for place, (token, owner) in enumerate(zip(tokens, owners, strict=True)):
        if owner is None:
            if token in alive:
                draw.rectangle(canvas.box(place), outline=_WHITE)
        elif token in regions.centres:
            draw.rectangle(canvas.box(place), outline=regions.colors[owner], width=line)
    for place, owner in enumerate(owners):
        if owner is not None:
            for side in _edges(canvas, owners, place):
                draw.rectangle(_strip(canvas.box(place), side, line), fill=regions.colors[owner])
    return canvas.shown(picture)


def _edges(canvas: Canvas, owners: Sequence[int | None], place: int) -> list[str]:
    """The sides of a token at which its region ends."""
    row, column = divmod(place, canvas.columns)
    beside = {
        "left": place - 1 if column else None,
        "right": place + 1 if column + 1 < canvas.columns else None,
        "top": place - canvas.columns if row else None,
        "bottom": place + canvas.columns if row + 1 < canvas.rows else None,
    }
    return [
        side for side, other in beside.items() if other is None or owners[other] != owners[place]
    ]


def _strip(box: tuple[int, int, int, int], side: str, line: int) -> tuple[int, int, int, int]:
    """The pixels of a box along one of its sides."""
    left, top, right, bottom = box
    if side == "left":
        return left, top, left + line - 1, bottom
    if side == "right":
        return right - line + 1, top, right, bottom
    if side == "top":
        return left, top, right, top + line - 1
    return left, bottom - line + 1, right, bottom
