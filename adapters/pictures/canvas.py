"""A picture under the grid of its visual tokens, each of them whole pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from ...prune.tiling import Block, Tiling
from ..family import Fit

Color = tuple[int, int, int]

LEGEND = "legend"
"""Key of a picture's `info`: the sentences that say what its colours mean."""
GREY = "Grey: dropped."
WHITE = "White lines: kept as it is."
OUTLINES = "Coloured outlines: merged, into the token with the box of that colour."
HATCHED = "Hatched: cut off, the model does not see it."
GAP = 12
_MIN_SIDE = 448
_BLANK = (224, 224, 224)
_WASH, _FADE = (120, 120, 120), 0.6
_MIST, _DIM, _STEP = (255, 255, 255), 0.6, 14


@dataclass(frozen=True)
class Canvas:
    """One panel: all of a picture, enlarged, and where its grid of tokens lies on it."""

    whole: Image.Image
    inside: Image.Image
    """What the tokens show, RGB, `cell` pixels each."""
    corner: tuple[int, int]
    """Of `inside` on `whole`."""
    rows: int
    columns: int

    @classmethod
    def of(cls, image: Image.Image, block: Block, fit: Fit) -> Canvas:
        """The grid is on all of the picture (`stretch`), or on the largest part in its middle that
        has the grid's shape (`crop`)."""
        rows, columns = block.rows, block.columns
        width, height = map(float, image.size)
        if fit == "crop":
            side = min(width / columns, height / rows)
            width, height = side * columns, side * rows
        left, top = (image.width - width) / 2, (image.height - height) / 2
        scale = max(1.0, _MIN_SIDE / min(width, height))
        # Whole pixels per token, so that the grid has no seams.
        size = (
            max(1, round(width * scale / columns)) * columns,
            max(1, round(height * scale / rows)) * rows,
        )
        across, down = size[0] / width, size[1] / height
        image = image.convert("RGB")
        inside = image.resize(
            size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        everything = round(image.width * across), round(image.height * down)
        whole = inside
        if everything != size:
            whole = image.resize(everything, Image.Resampling.BICUBIC)
        return cls(whole, inside, (round(left * across), round(top * down)), rows, columns)

    @property
    def cropped(self) -> bool:
        """Whether the tokens show a part of the picture only."""
        return self.whole.size != self.inside.size

    @property
    def cell(self) -> tuple[int, int]:
        """Width and height of a token."""
        return self.inside.width // self.columns, self.inside.height // self.rows

    def box(self, token: int) -> tuple[int, int, int, int]:
        """The pixels of a token on `inside`, the last ones included."""
        width, height = self.cell
        x, y = token % self.columns * width, token // self.columns * height
        return x, y, x + width - 1, y + height - 1

    def spread(self, mode: str, values: Sequence[int] | Sequence[Color]) -> Image.Image:
        """A value for each token as a picture of the size of `inside`."""
        small = Image.new(mode, (self.columns, self.rows))
        small.putdata(values)
        return small.resize(self.inside.size, Image.Resampling.NEAREST)

    def faded(self) -> Image.Image:
        """`inside` grey and flat, but still readable in dark and in bright pictures."""
        grey = self.inside.convert("L").convert("RGB")
        return Image.blend(grey, Image.new("RGB", grey.size, _WASH), _FADE)

    def shown(self, inside: Image.Image) -> Image.Image:
        """`inside`, painted on, in its frame on the whole picture, whose rest is dim and hatched:
        the model does not see it."""
        if not self.cropped:
            return inside
        picture = Image.blend(self.whole, Image.new("RGB", self.whole.size, _MIST), _DIM)
        draw = ImageDraw.Draw(picture)
        for x in range(-picture.height, picture.width, _STEP):
            draw.line((x, picture.height, x + picture.height, 0), fill=(150, 150, 150), width=1)
        (x, y), (width, height) = self.corner, inside.size
        draw.rectangle((x - 3, y - 3, x + width + 2, y + height + 2), fill=(255, 255, 255))
        draw.rectangle((x - 2, y - 2, x + width + 1, y + height + 1), fill=(0, 0, 0))
        picture.paste(inside, self.corner)
        return picture


def together(panels: Sequence[Image.Image], across: int | None = None) -> Image.Image:
    """Panels beside each other, `across` in a row (None: all)."""
    across = across or len(panels)
    rows = [panels[at : at + across] for at in range(0, len(panels), across)]
    heights = [max(panel.height for panel in row) for row in rows]
    widths = [sum(panel.width for panel in row) + GAP * (len(row) - 1) for row in rows]
    sheet = Image.new("RGB", (max(widths), sum(heights) + GAP * (len(rows) - 1)), "white")
    top = 0
    for row, height in zip(rows, heights, strict=True):
        left = 0
        for panel in row:
            sheet.paste(panel, (left, top))
            left += panel.width + GAP
        top += height + GAP
    return sheet


def on_tiles(pictures: Sequence[Image.Image], tiling: Tiling) -> Sequence[Image.Image]:
    """A picture for every tile, where it is not known how they lie on the one that is given: it is
    under its thumbnail, and nothing is under the crops."""
    if tiling.thumbnail is None or len(pictures) != 1:
        return pictures
    size = max(pictures[0].size)
    under = [Image.new("RGB", (size, size), _BLANK)] * len(tiling.blocks)
    return [*under[: tiling.thumbnail], pictures[0], *under[tiling.thumbnail + 1 :]]


def canvases(pictures: Sequence[Image.Image], blocks: Sequence[Block], fit: Fit) -> list[Canvas]:
    """A panel for every block: of the one picture, or of each frame.

    Raises:
        ValueError: there are neither one picture nor as many as blocks.
    """
    if len(pictures) not in (1, len(blocks)):
        raise ValueError(f"{len(pictures)} pictures for {len(blocks)} frames: give one per frame.")
    return [
        Canvas.of(pictures[number % len(pictures)], block, fit)
        for number, block in enumerate(blocks)
    ]
