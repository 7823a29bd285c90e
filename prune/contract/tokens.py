"""What a method is given, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..sight import Sight
from ..tiling import Tiling
from .place import Place
from .shape import ModelShape
from .signals import Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualTokens:
    """The tokens a method chooses from, and what it declared to see of them.

    Before the LLM: the patches of one tile or of a whole image, as the method's scope says.
    Newlines are among them only where they compete. Signals per token have `num_tokens` rows,
    those per tile one row for each of `tiling.tiles`.
    In the decoder (`layer` is the first that will see fewer): the N tokens of an image that are
    still alive, newlines included; `tiling` stays the image's own and `alive` holds their
    original numbers (N,), -1 for rows that stand for no token. For a pooled cut the images follow
    one another.
    """

    num_tokens: int
    tiling: Tiling
    shape: ModelShape
    signals: Mapping[Signal, Tensor]
    alive: Tensor | None = None
    place: Place = Place.BEFORE_LLM
    layer: int = 0
    tile: int = 0
    """Number of the image's tile that these tokens are, where the scope is one tile."""

    @property
    def depth(self) -> tuple[int, int]:
        """`Cut.depth` of the cut that is asked about."""
        return self.place.depth, self.layer

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the one tile that these tokens are."""
        (tile,) = self.tiling.tiles
        return tile.rows, tile.columns

    @property
    def device(self) -> torch.device:
        """Where the signals are; the CPU where there are none."""
        return next((t.device for t in self.signals.values()), torch.device("cpu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What survives of the tokens given, and how it enters the LLM.

    `kept` alone means: these tokens, as they are, in their order. Methods that merge, reorder or
    add rows say more. The number of rows that enter is that of `order`, or else of `kept`.
    """

    kept: Tensor
    """int64, ascending, unique numbers of the tokens that are kept or stand for a merged group."""
    order: Tensor | None = None
    """(K,) int64: the rows in the order in which the LLM sees them, a permutation of `kept` with
    -1 for rows that stand for no token (CLS, aggregates). None: as `kept`."""
    features: Tensor | None = None
    """(R, C) or (R, D): what enters in place of the tokens' own features. In training the method
    is asked a second time for these, with gradients in its signals `of_rows`."""
    rows: Tensor | None = None
    """(R,) int64: which rows `features` holds. None: all K, in order."""
    projected: bool = False
    """Whether `features` are LLM features (R, D) rather than encoder features (R, C), which pass
    the projector afterwards."""
    groups: Tensor | None = None
    """(2, G) int64 pairs: a row and a token that it was merged from, sorted by row."""
    scores: Tensor | None = None
    """(N,) floating: the numbers by which the tokens given were ranked, high ones stay. For people
    to look at (`patch(..., record=True)`): nothing is chosen by them any more. A method sets what
    it has computed anyway; None: see `Method.unranked`."""

    @property
    def arranged(self) -> Tensor:
        """(K,) `order`, or `kept` where there is none."""
        return self.kept if self.order is None else self.order

    @property
    def count(self) -> int:
        """K, rows that enter the LLM."""
        return len(self.arranged)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntries:
    """What one decoder layer stored of one prompt in prefill: S entries, in their order."""

    layer: int
    keys: Tensor
    """(H_kv, S, D_head) as attention uses them."""
    values: Tensor
    """(H_kv, S, D_head)"""
    queries: Tensor
    """(H, S, D_head) as attention uses them."""
    visual: Tensor
    """(S,) bool: which entries are visual tokens."""
    signals: Mapping[Signal, Tensor]
    """What the method declared, per entry: (S, ...)."""
    attention: Any
    """The layer's attention module."""
    hidden: Tensor
    """(S, D): the input of the attention module."""
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the entries' positions, (S, D_head) each."""
    sight: Sight = field(default_factory=Sight)
    """Which entries their rows see of each other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """What stays of `CacheEntries`."""

    kept: Tensor
    """(K,) int64 ascending; or (H_kv, K), where every key head keeps entries of its own."""
    keys: Tensor | None = None
    """(H_kv, K, D_head) in place of the kept entries' own, for methods that merge."""
    values: Tensor | None = None
    scores: Tensor | None = None
    """(S,) or (H_kv, S) floating, as `Selection.scores`."""
