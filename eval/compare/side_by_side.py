"""Pictures beside each other with captions, and pictures inside a page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ...adapters.pictures.canvas import GREY, HATCHED, OUTLINES, WHITE
from ...adapters.pictures.canvas import LEGEND as OF_PICTURE

_SCALE = "Colours with a scale: in how many layers the KV cache still has a token."
LEGEND = " ".join([GREY, WHITE, OUTLINES, HATCHED, _SCALE])
"""What all pictures mean together; the legend of one says what it has."""
_SIDE, _GAP, _LINE = 336, 12, 26
_MOST_LINES = 4
_LARGE, _SMALL = 22, 19


@dataclass(frozen=True)
class Panel:
    """One picture, what it is, and what was said to it."""

    picture: Image.Image
    caption: str
    text: str
    color: str = "black"


def side_by_side(title: str, panels: Sequence[Panel], columns: int) -> Image.Image:
    """Panels of one width in rows of `columns`, under a title and above what colours mean."""
    if columns < 1:
        raise ValueError(f"columns={columns} must be at least 1.")
    columns = min(columns, len(panels))
    large, small = ImageFont.load_default(_LARGE), ImageFont.load_default(_SMALL)
    width = columns * (_SIDE + _GAP) + _GAP
    heading = wrapped(title, large, width - 2 * _GAP)
    texts = [
        (wrapped(panel.caption, small, _SIDE), wrapped(panel.text, small, _SIDE))
        for panel in panels
    ]
    pictures = [_scaled(panel.picture) for panel in panels]
    rows = [range(at, min(at + columns, len(panels))) for at in range(0, len(panels), columns)]
    heights = [
        max(pictures[i].height + _LINE * (len(texts[i][0]) + len(texts[i][1])) for i in row) + _GAP
        for row in rows
    ]
    said = dict.fromkeys(one for panel in panels for one in panel.picture.info.get(OF_PICTURE, ()))
    footing = wrapped(" ".join(said), small, width - 2 * _GAP) if said else []
    top = _GAP + _LINE * len(heading) + _GAP // 2
    height = top + sum(heights) + _GAP + _LINE * len(footing)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for line, words in enumerate(heading):
        draw.text((_GAP, _GAP + _LINE * line), words, "black", large)
    for row, height in zip(rows, heights, strict=True):
        for column, index in enumerate(row):
            x, y = _GAP + column * (_SIDE + _GAP), top
            sheet.paste(pictures[index], (x, y))
            y += pictures[index].height + 2
            captions, answers = texts[index]
            for words, color in [
                *((words, "black") for words in captions),
                *((words, panels[index].color) for words in answers),
            ]:
                draw.text((x, y), words, color, small)
                y += _LINE
        top += height
    for line, words in enumerate(footing):
        draw.text((_GAP, top + _LINE * line), words, "#555555", small)
    return sheet


def wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels; what does not fit into a few lines is left out."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    lines = [_fitting(line, font, width) for line in lines]
    if len(lines) > _MOST_LINES:
        lines = [*lines[: _MOST_LINES - 1], _fitting(f"{lines[_MOST_LINES - 1]} ...", font, width)]
    return lines


def data_url(picture: Image.Image) -> str:
    """A picture as an address that holds it, for pages without files."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=72, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _fitting(line: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """A line without its end where it is too long: a single long word, the last line."""
    if font.getlength(line) <= width:
        return line
    line = line.removesuffix(" ...")
    while line and font.getlength(f"{line}...") > width:
        line = line[:-1]
    return f"{line}..."


def _scaled(picture: Image.Image) -> Image.Image:
    height = max(1, round(picture.height * _SIDE / picture.width))
    enlarging = picture.width < _SIDE
    how = Image.Resampling.BICUBIC if enlarging else Image.Resampling.LANCZOS
    return picture.convert("RGB").resize((_SIDE, height), how)
