"""How the visual tokens of one image lie: rectangles, the tiles they were encoded in, newlines.

LLaVA-NeXT shows the encoder a thumbnail and several crops, joins the crops to one canvas, cuts its
padding away and ends every row with a newline token. A `Tiling` describes this by sizes alone.

Two numberings: *tokens* are the image's places in the prompt, newlines included (N of them);
*patches* are the tokens without newlines, in the same order (P of them).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate, count
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Block:
    """A rectangle of patches in raster order, made of rows and columns of tiles.

    `row_sizes` are the heights of its rows of tiles and `column_sizes` the widths of their
    columns, in patches; a tile of which padding was cut away is smaller, possibly empty. A newline
    token follows each row of patches, or the last one, or none. `lead` tokens without a patch stand
    in front of the first row (the CLS row of a frame): they count as newlines.
    """

    row_sizes: tuple[int, ...]
    column_sizes: tuple[int, ...]
    newline: Literal["none", "rows", "end"] = "none"
    lead: int = 0

    @property
    def rows(self) -> int:
        return sum(self.row_sizes)

    @property
    def columns(self) -> int:
        return sum(self.column_sizes)

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns

    @property
    def num_newlines(self) -> int:
        return self.lead + {"none": 0, "rows": self.rows, "end": 1}[self.newline]


@dataclass(frozen=True, slots=True)
class Tile:
    """What the encoder saw as one picture: a rectangle of patches, all of them still there.

    `block` is the number of its block, `place` its row and column among the tiles of the block,
    `origin` its first row and column of patches in the block, `picture` its number among all tiles
    that the encoder saw, empty ones included.
    """

    rows: int
    columns: int
    block: int = 0
    place: tuple[int, int] = (0, 0)
    origin: tuple[int, int] = (0, 0)
    picture: int = 0

    @property
    def num_patches(self) -> int:
        return self.rows * self.columns


@dataclass(frozen=True, slots=True)
class Tiling:
    """The blocks of an image in the order of their tokens.

    One block for a plain image; thumbnail and canvas for tiles; one block per frame of a video, or
    per tile where it is not known how tiles lie on the canvas.
    """

    blocks: tuple[Block, ...]
    thumbnail: int | None = None
    """The block of one tile that shows the whole picture, where crops of it are blocks of their
    own."""

    @classmethod
    def single(cls, rows: int, columns: int) -> Tiling:
        """A plain image: one tile."""
        return cls((Block((rows,), (columns,)),))

    @property
    def num_patches(self) -> int:
        return sum(block.num_patches for block in self.blocks)

    @property
    def num_newlines(self) -> int:
        return sum(block.num_newlines for block in self.blocks)

    @property
    def num_tokens(self) -> int:
        return self.num_patches + self.num_newlines

    @property
    def tiles(self) -> tuple[Tile, ...]:
        """All tiles that have patches: block by block, in reading order."""
        return _tiles(self)

    @property
    def whole(self) -> int | None:
        """The number, in `tiles`, of the tile that shows the whole picture beside crops of it: that
        of `thumbnail`, or the first one where a canvas of several tiles is behind it."""
        tiles = self.tiles
        if self.thumbnail is not None:
            return next(n for n, tile in enumerate(tiles) if tile.block == self.thumbnail)
        of_one_tile = tiles[0].num_patches == self.blocks[0].num_patches
        return 0 if len(self.blocks) == 2 and of_one_tile and len(tiles) > 2 else None

    def without_newlines(self) -> Tiling:
        bare = tuple(replace(one, newline="none", lead=0) for one in self.blocks)
        return replace(self, blocks=bare)

    def patches(self, device: torch.device) -> Tensor:
        """Token number of every patch: (P,) int64, ascending."""
        return _numbers(self)[0].to(device)

    def newlines(self, device: torch.device) -> Tensor:
        """Token number of every newline: (N - P,) int64, ascending."""
        return _numbers(self)[1].to(device)

    def tile_patches(self, device: torch.device) -> Sequence[Tensor]:
        """Per tile, the numbers of its patches in raster order: (rows * columns,) int64 each."""
        return [indices.to(device) for indices in _tile_patches(self)]


@lru_cache(maxsize=4096)
def _tiles(tiling: Tiling) -> tuple[Tile, ...]:
    tiles = []
    picture = count()
    for number, block in enumerate(tiling.blocks):
        tops = [0, *accumulate(block.row_sizes)]
        lefts = [0, *accumulate(block.column_sizes)]
        tiles += [
            Tile(rows, columns, number, (i, j), (tops[i], lefts[j]), next(picture))
            for i, rows in enumerate(block.row_sizes)
            for j, columns in enumerate(block.column_sizes)
        ]
    return tuple(tile for tile in tiles if tile.num_patches)


@lru_cache(maxsize=256)
def _numbers(tiling: Tiling) -> tuple[Tensor, Tensor]:
    """Those of the patches, and those of the newlines."""
    parts = []
    for block in tiling.blocks:
        parts.append(torch.ones(block.lead, dtype=torch.bool))
        marks = torch.zeros(block.rows, block.columns + (block.newline == "rows"), dtype=torch.bool)
        if block.newline == "rows":
            marks[:, -1] = True
        parts.append(marks.flatten())
        if block.newline == "end":
            parts.append(torch.ones(1, dtype=torch.bool))
    is_newline = torch.cat(parts)
    return (~is_newline).nonzero()[:, 0], is_newline.nonzero()[:, 0]


@lru_cache(maxsize=256)
def _tile_patches(tiling: Tiling) -> tuple[Tensor, ...]:
    starts = [0, *accumulate(block.num_patches for block in tiling.blocks)]
    found = []
    for tile in tiling.tiles:
        block = tiling.blocks[tile.block]
        rows = torch.arange(tile.origin[0], tile.origin[0] + tile.rows)
        columns = torch.arange(tile.origin[1], tile.origin[1] + tile.columns)
        found.append((starts[tile.block] + rows[:, None] * block.columns + columns).flatten())
    return tuple(found)
