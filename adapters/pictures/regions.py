"""Merged rows as regions of an image: which tokens each has taken in, and a colour for it."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from ...prune.tiling import Tiling
from .canvas import Color

_GOLDEN = 0.6180339887498949  # of a turn, between one hue and the next
_HUES = 16
_APART = 0.2


@dataclass(frozen=True)
class Regions:
    """The tokens of rows that stand for more than themselves."""

    owner: dict[int, int]
    """The row of each token that is in one: its own, else the first that took it in."""
    centres: frozenset[int] = frozenset()
    """Tokens whose place and number a merged row has."""
    colors: dict[int, Color] = field(default_factory=dict)
    """Of each row; those of neighbours differ."""
    in_one_piece: bool = True
    """Whether an outline says all, as no region is scattered."""

    @classmethod
    def of(
        cls, tiling: Tiling, kept: Tensor, rows: Tensor | None, members: Tensor | None
    ) -> Regions:
        """
        Args:
            kept: (K,) numbers of the tokens that are alive.
            rows: (K',) the token that each row is, -1 for none; None: as `kept`.
            members: (2, G) pairs of a row and a token merged into it; None: nothing was merged.
        """
        if members is None:
            return cls({})
        tokens = (kept if rows is None else rows).tolist()
        taken: dict[int, list[int]] = {}
        for row, token in members.T.tolist():
            taken.setdefault(row, []).append(token)
        merged = {row: of_row for row, of_row in taken.items() if of_row != [tokens[row]]}
        alive = set(kept.tolist())
        owner: dict[int, int] = {}
        for row, of_row in sorted(merged.items()):
            for token in of_row:
                if token not in alive:
                    owner.setdefault(token, row)
        centres = {tokens[row]: row for row in merged if tokens[row] >= 0}
        owner |= centres
        pairs = _touching(tiling)
        plain = _in_one_piece(owner, pairs)
        return cls(owner, frozenset(centres), _colors(owner, pairs), plain)


Pairs = set[tuple[int, int]]
"""Of tokens that lie beside or below each other."""


def _touching(tiling: Tiling) -> Pairs:
    """All of an image, in its blocks."""
    numbers, start, pairs = tiling.patches(torch.device("cpu")).tolist(), 0, set()
    for block in tiling.blocks:
        here = numbers[start : start + block.num_patches]
        start += block.num_patches
        pairs |= {(a, b) for n, (a, b) in enumerate(pairwise(here), 1) if n % block.columns}
        pairs |= set(zip(here, here[block.columns :], strict=False))
    return pairs


def _in_one_piece(owner: dict[int, int], pairs: Pairs) -> bool:
    """Whether each region is."""
    group = {token: token for token in owner}

    def root(token: int) -> int:
        while group[token] != token:
            group[token] = token = group[group[token]]
        return token

    for one, two in pairs:
        if one in owner and owner[one] == owner.get(two):
            group[root(one)] = root(two)
    return len({root(token) for token in owner}) == len(set(owner.values()))


def _colors(owner: dict[int, int], pairs: Pairs) -> dict[int, Color]:
    """Of each row, hues a golden angle apart, passing over those that a neighbour nearly has."""
    touching: dict[int, set[int]] = {row: set() for row in owner.values()}
    for one, two in pairs:
        if one in owner and two in owner and owner[one] != owner[two]:
            touching[owner[one]].add(owner[two])
            touching[owner[two]].add(owner[one])
    hues: dict[int, float] = {}
    for number, row in enumerate(dict.fromkeys(owner[token] for token in sorted(owner))):
        near = [hues[other] for other in touching[row] if other in hues]
        choices = [(number + step) * _GOLDEN % 1 for step in range(_HUES)]
        apart = [min((_distance(hue, other) for other in near), default=1.0) for hue in choices]
        free = [hue for hue, distance in zip(choices, apart, strict=True) if distance >= _APART]
        hues[row] = free[0] if free else choices[apart.index(max(apart))]
    return {row: _color(hue) for row, hue in hues.items()}


def _distance(one: float, two: float) -> float:
    """Of two hues, in turns: 0 to 1/2."""
    away = abs(one - two) % 1
    return min(away, 1 - away)


def _color(hue: float) -> Color:
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)
