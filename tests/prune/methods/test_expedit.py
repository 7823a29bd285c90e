"""Expedit: against the authors' clusters and what they restore, by hand, its grids, its block."""

import math
from contextlib import suppress
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import inside
from kit.golden import Runner
from vlmprune.prune.contract import BlockCut, Reduction, Tower
from vlmprune.prune.errors import (
    BudgetError,
    MethodFieldError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from vlmprune.prune.ops.centres import clustered
from vlmprune.prune.registry import method, method_class

EXPEDIT = method_class("expedit")
TOWER = inside.TOWERS["siglip"]


def compare(golden, expedit):
    """Centres, labels, and rows restored from centres with other values. Where the authors' grid of
    centres is not the one that the method lays for their number, only its operations can be
    compared."""
    params, arrays = golden.params, golden.arrays
    x, grid = arrays["x"], (params["h"], params["w"])
    centres = (params["clusters_h"], params["clusters_w"])
    if expedit_lays(grid, centres):
        rows = inside.given(expedit, TOWER, x, grid=grid)
        made = inside.checked(expedit, rows, math.prod(centres))
    else:
        matrix, owner = clustered(
            x[None],
            grid,
            centres,
            rounds=expedit.rounds,
            temperature=expedit.temperature,
            window=expedit.window,
        )
        made = Reduction(source=owner.new_full(matrix.shape[:2], -1), owner=owner, matrix=matrix)
    close = partial(torch.testing.assert_close, rtol=0)
    close(made.apply(x[None])[0], arrays["centers"], atol=2e-3)
    close(made.matrix.sum(2), torch.ones(made.source.shape), atol=1e-4)
    assert (made.owner[0] != arrays["hard_labels"]).float().mean() <= 0.003
    restored = expedit.restore(x[None], arrays["y_low"][None], made)
    close(restored[0], arrays["x_recon"], atol=5e-3)


def expedit_lays(grid: tuple[int, int], centres: tuple[int, int]) -> bool:
    with suppress(BudgetError):
        return EXPEDIT()._centres(grid, math.prod(centres)) == centres
    return False


GOLDEN = {
    "expedit": Runner(
        "expedit",
        lambda p: {
            "rounds": p["n_iters"],
            "temperature": p["temperature"],
            "window": p["window"],
            "nearest": p["recon_k"],
        },
        compare,
    )
}


def test_expedit_by_hand():
    """One row of four patches, two cells. With a window of 1 centres are means of their cells."""
    expedit = EXPEDIT(window=1, rounds=3)
    x = torch.tensor([[0.0], [2], [6], [8]])
    made = inside.checked(expedit, inside.given(expedit, TOWER, x, grid=(2, 2)), 2)
    assert made.source.tolist() == [[-1, -1]]
    torch.testing.assert_close(made.apply(x[None]), torch.tensor([[[3.0], [5]]]))  # of columns
    assert made.owner.tolist() == [[0, 0, 1, 1]]
    assert made.sizes(torch.ones(1, 4)).tolist() == [[2, 2]]


def test_expedit_rounds_by_hand():
    """Every centre is a candidate: weights are softmaxes of squared distances."""
    expedit = EXPEDIT(rounds=2, temperature=0.5)
    x = torch.tensor([[0.0], [1], [4], [7]])
    made = inside.checked(expedit, inside.given(expedit, TOWER, x, grid=(1, 4)), 2)
    centres = [0.5, 5.5]
    for _ in range(2):
        weights = torch.tensor([[-0.5 * (float(row) - c) ** 2 for row in x] for c in centres])
        weights = weights.softmax(0)
        centres = [float((w * x[:, 0]).sum() / w.sum()) for w in weights]
    assert made.apply(x[None]).flatten().tolist() == pytest.approx(centres, abs=1e-4)
    assert made.owner.tolist() == [[0, 0, 1, 1]]


def test_expedit_restores_by_hand():
    """Of the three centres the nearest two count, and weights have length 1."""
    expedit = EXPEDIT(window=1, nearest=2, temperature=0.5)
    x = torch.tensor([[0.0], [1], [3]])
    made = inside.checked(expedit, inside.given(expedit, TOWER, x, grid=(1, 3)), 3)
    after = torch.tensor([[[1.0], [10], [100]]])
    weights = torch.tensor([[0.5, 0.0], [0.5, 0.0], [2.0, 0.0]]).neg().exp().flip(1)
    unit = weights / weights.norm(dim=1, keepdim=True)
    wanted = unit * torch.tensor([[1.0, 10], [10, 1], [100, 10]])
    torch.testing.assert_close(expedit.restore(x[None], after, made)[0, :, 0], wanted.sum(1))


def test_expedit_restores_rows_that_are_far_from_all_centres():
    """Where weights by themselves are zeros, the nearest centre is taken."""
    expedit = EXPEDIT(temperature=10)
    rows = inside.drawn(expedit, TOWER, 16, grid=(4, 4))
    made = inside.checked(expedit, rows, 4)
    x = rows.signals[expedit.reads(rows.cut, TOWER)[0]] + 100
    restored = expedit.restore(x, torch.ones(2, 4, 3, dtype=torch.bfloat16), made)
    assert restored.dtype == torch.bfloat16
    assert bool((restored > 0.9).all())


@pytest.mark.parametrize(
    ("grid", "keep", "centres"),
    [
        ((24, 24), 144, (12, 12)),
        ((24, 24), 1, (1, 1)),
        ((24, 24), 8, (2, 4)),
        ((24, 24), 63, (7, 9)),
        ((14, 28), 98, (7, 14)),
        ((28, 14), 98, (14, 7)),
        ((4, 4), 12, (3, 4)),
    ],
)
def test_expedit_grids_of_centres(grid, keep, centres):
    assert EXPEDIT()._centres(grid, keep) == centres


@pytest.mark.parametrize(
    ("grid", "keep", "nearest"),
    [
        ((24, 24), 23, 24),
        ((24, 24), 575, 576),
        ((24, 24), 97, 96),
        ((4, 4), 5, 4),
        ((4, 4), 13, 12),
    ],
)
def test_expedit_names_the_nearest_count(grid, keep, nearest):
    rows = inside.drawn(EXPEDIT(), TOWER, grid[0] * grid[1], grid=grid)
    with pytest.raises(BudgetError, match=f"lay {keep} centres .* that it can is {nearest}"):
        EXPEDIT().reduce(rows, keep)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**31), st.data())
def test_expedit_makes_exactly_as_many(high, wide, seed, data):
    expedit = EXPEDIT()
    if high * wide < 2:
        return
    keep = data.draw(st.integers(1, high * wide - 1))
    rows = inside.drawn(expedit, TOWER, high * wide, batch=3, grid=(high, wide), seed=seed)
    try:
        made = inside.checked(expedit, rows, keep)
    except BudgetError as error:
        keep = int(str(error).rpartition(" ")[2].rstrip("."))
        if keep == high * wide:
            return
        made = inside.checked(expedit, rows, keep)
    assert made.owner.min() >= 0 and made.owner.max() < keep
    torch.testing.assert_close(made.matrix.sum(2), torch.ones(3, keep), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("tower", "block"), [("clip", 10), ("siglip", 12), ("deit", 5), ("tiny", 0)]
)
def test_expedit_block(tower, block):
    assert EXPEDIT().blocks(inside.TOWERS[tower]) == (BlockCut(block, "block"),)
    assert EXPEDIT(layer=-12).blocks(Tower(num_layers=32, has_cls=False)) == (
        BlockCut(20, "block"),
    )


def test_expedit_is_refused_where_centres_have_no_place():
    for tower in (inside.TOWERS["windowed"], Tower(num_layers=9, has_cls=False, rotary=True)):
        with pytest.raises(UnsupportedModelError, match="windowed and rotary encoders"):
            EXPEDIT().blocks(tower)


@pytest.mark.parametrize(("grid", "said"), [(None, "on none"), ((4, 5), "on 4 x 5")])
def test_expedit_needs_a_whole_grid(grid, said):
    rows = inside.drawn(EXPEDIT(), TOWER, 16, grid=grid)
    with pytest.raises(UnsupportedFeatureError, match=f"16 rows of this picture are {said}"):
        EXPEDIT().reduce(rows, 4)


def test_expedit_needs_a_budget_of_rows():
    with pytest.raises(BudgetError, match="expedit needs a budget"):
        method("expedit")
    with pytest.raises(BudgetError, match="the LLM sees all tokens again"):
        method("expedit", average_tokens=64)


@pytest.mark.parametrize(
    "fields", [{"rounds": 0}, {"window": 4}, {"temperature": 0}, {"nearest": 0}, {"layer": 1.5}]
)
def test_expedit_refuses_impossible_fields(fields):
    with pytest.raises(MethodFieldError, match="is not possible"):
        EXPEDIT(**fields)
