"""grid_encoder: lattices, even counts everywhere, nested from cut to cut."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import inside
from vlmprune.prune.registry import method_class

GRID = method_class("grid_encoder")()
TOWER = inside.TOWERS["clip"]


def kept(count: int, keep: int, grid=None) -> torch.Tensor:
    made = inside.checked(GRID, inside.drawn(GRID, TOWER, count, grid=grid), keep)
    assert made.owner is None
    return made.source[0]


def test_grid_encoder_halves_and_quarters():
    """A chessboard, every second row and column, every fourth."""
    assert kept(16, 8, (4, 4)).tolist() == [0, 2, 5, 7, 8, 10, 13, 15]
    assert kept(16, 4, (4, 4)).tolist() == [0, 2, 8, 10]
    assert kept(24 * 24, 36, (24, 24)).tolist() == [
        24 * row + column for row in range(0, 24, 4) for column in range(0, 24, 4)
    ]


def test_grid_encoder_without_a_grid():
    assert kept(16, 8).tolist() == list(range(0, 16, 2))
    assert kept(16, 4).tolist() == [0, 4, 8, 12]


@given(st.integers(2, 30), st.integers(2, 30), st.data())
def test_grid_encoder_is_even_and_nested(high, wide, data):
    """Any count lies in each larger one, and every window of 4 x 4 has its share within 2."""
    keep = data.draw(st.integers(1, high * wide - 1))
    chosen = kept(high * wide, keep, (high, wide))
    if keep > 1:
        fewer = data.draw(st.integers(1, keep - 1))
        rows = inside.drawn(GRID, TOWER, high * wide, grid=(high, wide))
        left = replace(rows, numbers=chosen.expand(2, -1), sizes=torch.ones(2, keep))
        again = chosen[GRID.reduce(left, fewer).source[0]]
        assert torch.equal(again, kept(high * wide, fewer, (high, wide)))
    filled = torch.zeros(high * wide).scatter(0, chosen, 1).view(high, wide)
    if min(high, wide) >= 4:
        windows = filled.unfold(0, 4, 1).unfold(1, 4, 1).sum((2, 3))
        assert windows.max() - windows.min() <= 2


@pytest.mark.parametrize("tower", sorted(inside.TOWERS))
def test_grid_encoder_cuts_where_evit_does(tower):
    tower = inside.TOWERS[tower]
    assert GRID.blocks(tower) == method_class("evit")().blocks(tower)
