"""pool: average pooling, cells that are a partition, tiles joined in raster order."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.merging import CPU, make
from torch.nn.functional import avg_pool2d
from vlmprune.prune.contract import Features
from vlmprune.prune.ops.spread import even_shares, lattice_rows
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Block, Tiling


@pytest.mark.parametrize("rows", range(1, 6))
@pytest.mark.parametrize("columns", [1, 2, 7, 24])
def test_a_lattice_has_room(rows, columns):
    for count in range(1, rows * columns + 1):
        used = lattice_rows(count, rows, columns)
        assert 1 <= used <= min(rows, count)
        assert max(even_shares(count, used)) <= columns
        assert sum(even_shares(count, used)) == count
    assert lattice_rows(rows * columns, rows, columns) == rows


@pytest.mark.parametrize(
    ("grid", "side"), [((24, 24), 2), ((24, 24), 3), ((24, 24), 8), ((12, 30), 6), ((8, 4), 4)]
)
def test_pool_is_average_pooling(grid, side):
    rows, columns = grid
    pool, tiling = method_class("pool")(), Tiling.single(*grid)
    tokens = make(pool, tiling)
    features = tokens.signals[Features()]
    chosen = pool.select(tokens, rows * columns // side**2)
    image = features.T.view(1, -1, rows, columns)
    torch.testing.assert_close(chosen.features, avg_pool2d(image, side)[0].flatten(1).T)
    assert chosen.projected
    assert chosen.order is None
    middle = (side - 1) // 2
    lattice = [
        row * columns + column
        for row in range(middle, rows, side)
        for column in range(middle, columns, side)
    ]
    assert chosen.kept.tolist() == lattice


@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (1, 9), (13, 2)], ids=str)
def test_pool_cells_are_a_partition_into_rectangles(grid):
    columns = grid[1]
    pool, tiling = method_class("pool")(), Tiling.single(*grid)
    tokens = make(pool, tiling)
    features = tokens.signals[Features()]
    for keep in range(1, tiling.num_tokens):
        chosen = pool.select(tokens, keep)
        assert sorted(chosen.groups[1].tolist()) == list(range(tiling.num_tokens))
        assert chosen.groups[0].unique().tolist() == list(range(keep))
        for cell in range(keep):
            members = chosen.groups[1][chosen.groups[0] == cell]
            high, wide = (members // columns).unique(), (members % columns).unique()
            assert len(high) * len(wide) == len(members)
            assert high[-1] - high[0] == len(high) - 1
            assert wide[-1] - wide[0] == len(wide) - 1
            middle = chosen.kept[cell]
            assert middle == high[(len(high) - 1) // 2] * columns + wide[(len(wide) - 1) // 2]
            torch.testing.assert_close(chosen.features[cell], features[members].mean(0))


@given(st.integers(4, 24), st.integers(4, 24), st.floats(0, 1))
def test_pool_cells_are_about_square(rows, columns, part):
    """In the mean; whole numbers make single cells longer."""
    least = math.ceil(max(rows, columns) / min(rows, columns))
    keep = min(rows * columns - 1, max(least, round(part * rows * columns)))
    pool = method_class("pool")()
    groups = pool.select(make(pool, Tiling.single(rows, columns)), keep).groups
    height, width = torch.zeros(2, keep, dtype=torch.int64)
    for cell in range(keep):
        members = groups[1][groups[0] == cell]
        height[cell], width[cell] = (
            (members // columns).unique().numel(),
            (members % columns).unique().numel(),
        )
    assert height.max() - height.min() <= 1
    assert 0.5 <= height.float().mean() / width.float().mean() <= 2


def test_pool_of_tiles_joins_in_raster_order():
    """Tiles of 16 and 4 x 12 patches at a quarter: 2 x 2 everywhere, rows in reading order."""
    tiling = Tiling((Block((4,), (4,)), Block((4, 4), (4, 4), newline="rows")))
    pool = method_class("pool")()
    tokens = make(pool, tiling)
    chosen = select(pool, tokens, 20)
    features = tokens.signals[Features()]
    small, large = features[:16].T.view(1, 5, 4, 4), features[16:].T.view(1, 5, 8, 8)
    pooled = [avg_pool2d(part, 2)[0].flatten(1).T for part in (small, large)]
    assert chosen.order is None
    entering = torch.empty(20, 5)
    entering[chosen.rows] = chosen.features
    torch.testing.assert_close(entering, torch.cat(pooled))
    numbers = tiling.patches(CPU).tolist()
    for row, token in chosen.groups.T.tolist():
        at = numbers.index(token)
        block, width = (0, 4) if at < 16 else (16, 8)
        place = (at - block) // width // 2 * (width // 2) + (at - block) % width // 2
        assert row == place + (0 if at < 16 else 4)
