"""grid: every second row and column, no holes."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.drawn import make_tokens
from vlmprune.prune.registry import method_class


def test_grid_quarter_is_every_second_row_and_column():
    method = method_class("grid")()
    kept = method.select(make_tokens(method, (24, 24)), 144).kept
    rows, columns = kept // 24, kept % 24
    assert rows.unique().tolist() == columns.unique().tolist() == list(range(1, 24, 2))


def test_grid_half_is_a_checkerboard():
    method = method_class("grid")()
    kept = method.select(make_tokens(method, (14, 14)), 98).kept
    assert ((kept // 14 + kept % 14) % 2).unique().numel() == 1


@given(st.integers(3, 24), st.integers(3, 24), st.floats(0, 1))
def test_grid_leaves_no_hole(rows, columns, share):
    """No token is much farther from a kept one than in a square lattice of that density."""
    num_tokens = rows * columns
    least = math.ceil(max(rows, columns) / min(rows, columns))  # fewer form a line, not a lattice
    keep = min(num_tokens - 1, max(least, round(share * num_tokens)))
    method = method_class("grid")()
    kept = method.select(make_tokens(method, (rows, columns)), keep).kept
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
    farthest = torch.cdist(places, places[kept]).amin(1).max()
    half_diagonal = math.sqrt(num_tokens / keep / 2)
    assert farthest <= 1.3 * (half_diagonal + 0.5)
