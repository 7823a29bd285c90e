"""An image as its tiles: what each is given and keeps, and how their selections become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .contract import BeforeLLM, Scope, Selection, VisualTokens
from .joining import joined, renumbered
from .ops.spread import share
from .tiling import Tiling


@dataclass(frozen=True)
class Part:
    """A tile of an image, or all of it."""

    tokens: VisualTokens
    keep: int | None
    """Its share of the image's count; None where the method finds its own."""
    numbers: Tensor | None = None
    """(P,) its tokens among the image's; None: all."""

    @property
    def asked(self) -> tuple[VisualTokens, int | None]:
        return self.tokens, self.keep


def cut(tokens: VisualTokens, keep: int | None) -> list[Part]:
    """The tiles of an image, with shares of the count by their sizes; none for those without."""
    tiles = tokens.tiling.tiles
    if len(tiles) == 1:
        return [Part(tokens, keep)]
    counts: Sequence[int | None] = [None] * len(tiles)
    if keep is not None:
        counts = share(keep, [tile.num_patches for tile in tiles])
    numbers = tokens.tiling.tile_patches(tokens.device)
    return [
        Part(_tile(tokens, number, of_tile), count, of_tile)
        for number, (of_tile, count) in enumerate(zip(numbers, counts, strict=True))
        if count != 0
    ]


def join(tokens: VisualTokens, parts: Sequence[Part], found: Sequence[Selection]) -> Selection:
    """What is kept of the image, from what is kept of its parts; see `joined`."""
    if parts[0].numbers is None:
        return found[0]
    return joined(
        [
            chosen if part.numbers is None else renumbered(chosen, part.numbers, tokens.num_tokens)
            for part, chosen in zip(parts, found, strict=True)
        ]
    )


def whole(tokens: VisualTokens) -> Selection:
    """All tokens, as they are."""
    return Selection(kept=torch.arange(tokens.num_tokens, device=tokens.device))


@dataclass(frozen=True, kw_only=True)
class InTiles(BeforeLLM):
    """A method of whole images that chooses in each of their tiles.

    It stands before the class that holds the rule, `class Mine(InTiles, InOnePass)`: the rule is
    asked about all tiles of all images at once, except those that stay or go as a whole.
    """

    needs_grid: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = ("image",)

    def seen(self, tokens: VisualTokens) -> VisualTokens:
        """The image as its tiles see it: here signals can be weighed over all of it."""
        return tokens

    def join(
        self, tokens: VisualTokens, parts: Sequence[Part], found: Sequence[Selection]
    ) -> Selection:
        """The image's selection, from those of its tiles; here rows can be arranged."""
        return join(tokens, parts, found)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return self.select_batch([(tokens, keep)])[0]

    def select_batch(self, asked: Sequence[tuple[VisualTokens, int]]) -> list[Selection]:
        images = [self.seen(tokens) for tokens, _ in asked]
        cuts = [cut(image, keep) for image, (_, keep) in zip(images, asked, strict=True)]
        tiles = [(part.tokens, part.keep or 0) for parts in cuts for part in parts]
        given = iter(super().select_batch([t for t in tiles if t[1] < t[0].num_tokens]))
        found = iter([next(given) if k < t.num_tokens else whole(t) for t, k in tiles])
        return [
            self.join(image, parts, [next(found) for _ in parts])
            for image, parts in zip(images, cuts, strict=True)
        ]


def _tile(tokens: VisualTokens, number: int, numbers: Tensor) -> VisualTokens:
    tile = tokens.tiling.tiles[number]
    signals = {}
    for signal, tensor in tokens.signals.items():
        if signal.per == "token":
            tensor = tensor.index_select(0, numbers)
        elif signal.per == "tile":
            tensor = tensor[number : number + 1]
        signals[signal] = tensor
    return VisualTokens(
        num_tokens=tile.num_patches,
        tiling=Tiling.single(tile.rows, tile.columns),
        shape=tokens.shape,
        signals=signals,
        tile=number,
    )
