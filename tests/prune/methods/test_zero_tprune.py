"""Zero-TPrune: both stages by hand, heads that count, rounds by depth, exact counts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import inside
from vlmprune.prune.contract import BlockCut, HeadRank, Keys
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.registry import method, method_class

ZERO = method_class("zero_tprune")
DEIT = inside.TOWERS["deit"]
KEYS = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, -1], [0.1, 1], [2, 0.1]])[:, None]
VOTE = torch.tensor([1.5, 1.4, 1.2, 0.8, 0.6, 0.5])[:, None]
RANK = torch.tensor([0.5, 1.6, 1.2, 1.1, 0.9, 0.7])[:, None]


@pytest.mark.parametrize(
    ("similar", "keep", "kept"),
    [
        (0.5, 4, [1, 2, 3, 4]),  # 5 is most like 0; then 0 ranks lowest
        (0.5, 3, [1, 2, 3]),  # 5 and 4, which is like 1; then 0
        (1, 4, [0, 1, 2, 3]),
        (1, 5, [0, 1, 2, 3, 4]),
        (0, 5, [1, 2, 3, 4, 5]),
        (0, 1, [1]),
        (1, 1, [1]),  # the lower half is all that can be like the upper
    ],
)
def test_zero_tprune_by_hand(similar, keep, kept):
    zero = ZERO(similar=similar)
    rows = inside.given(zero, DEIT, KEYS, VOTE, RANK)
    made = inside.checked(zero, rows, keep)
    assert made.source.tolist() == [kept]
    assert made.owner is None


def test_zero_tprune_parts_by_the_vote():
    """With the votes turned around rows 0 to 2 are the lower half: 0 is like 5."""
    zero = ZERO(similar=1)
    rows = inside.given(zero, DEIT, KEYS, VOTE.flip(0), RANK)
    assert inside.checked(zero, rows, 5).source.tolist() == [[1, 2, 3, 4, 5]]


def test_zero_tprune_leaves_heads_out():
    """Heads that rank all rows alike, or one row alone, do not count; the others do by the root of
    their mean square, which prefers a row that one head ranks very high."""
    zero = ZERO(similar=0)
    flat, alone = torch.full((6,), 1.0), torch.tensor([6.0, 0, 0, 0, 0, 0])
    one = torch.tensor([0.2, 1, 1.6, 1, 1, 1.2])
    two = torch.tensor([0.2, 1, 0.2, 1.1, 1, 1.2])
    heads = torch.stack([flat, one, alone, two], 1)
    made = inside.checked(zero, inside.given(zero, DEIT, KEYS, heads, heads), 2)
    assert made.source.tolist() == [[2, 5]]  # means of squares 1.3 and 1.44; of row 3 1.105


def test_zero_tprune_counts_all_heads_where_none_fits():
    zero = ZERO(similar=0)
    heads = torch.tensor([[9.0, 0], [0, 8], [0, 0], [0, 0], [0, 0], [0, 1]])
    made = inside.checked(zero, inside.given(zero, DEIT, KEYS, heads, heads), 3)
    assert made.source.tolist() == [[0, 1, 5]]


def test_zero_tprune_rounds_and_starts():
    """More rounds the earlier; CLS begins larger where there is one."""
    cuts = ZERO().blocks(DEIT)
    assert cuts == tuple(BlockCut(block, "mlp") for block in (1, 3, 6, 9, 11))
    rounds = [50, 10, 10, 1, 1]
    for cut, count in zip(cuts, rounds, strict=True):
        first, more = HeadRank(cut.block, 1, 14), HeadRank(cut.block, count, 14)
        wanted = (Keys(cut.block), first) + ((more,) if count > 1 else ())
        assert ZERO().reads(cut, DEIT) == wanted
    windowed = inside.TOWERS["windowed"]
    blocks = [cut.block for cut in ZERO().blocks(windowed)]
    assert blocks == [7, 15, 23, 31]
    assert ZERO().reads(BlockCut(7), windowed)[1] == HeadRank(7, 1, 1)


@given(st.sampled_from(sorted(inside.TOWERS)), st.integers(1, 700), st.data())
def test_zero_tprune_counts_are_exact(tower, rows, data):
    tower, keep = inside.TOWERS[tower], data.draw(st.integers(1, rows))
    counts = ZERO().block_counts(tower, rows, keep)
    assert counts[-1] == keep and len(counts) == len(ZERO().blocks(tower))
    assert list(counts) == sorted(counts, reverse=True) and counts[0] <= rows


@given(
    st.sampled_from(sorted(inside.TOWERS)),
    st.integers(2, 60),
    st.floats(0, 1),
    st.integers(0, 2**31),
    st.data(),
)
def test_zero_tprune_keeps_exactly(tower, count, similar, seed, data):
    zero, keep = ZERO(similar=similar), data.draw(st.integers(1, count - 1))
    tower = inside.TOWERS[tower]
    cut = data.draw(st.sampled_from(zero.blocks(tower)))
    rows = inside.drawn(zero, tower, count, batch=3, cut=cut, seed=seed)
    source = inside.checked(zero, rows, keep).source
    assert bool((source[:, 1:] > source[:, :-1]).all())


def test_zero_tprune_ties_go_to_the_lower_row():
    zero = ZERO()
    flat = torch.ones(9, 2)
    rows = inside.given(zero, DEIT, torch.ones(9, 2, 3), flat, flat)
    # Upper half 0 to 4; 5 and 6 leave as the first of equals, then the last two.
    assert inside.checked(zero, rows, 5).source.tolist() == [[0, 1, 2, 3, 4]]


def test_zero_tprune_needs_a_budget():
    with pytest.raises(BudgetError, match="zero_tprune needs a budget"):
        method("zero_tprune")
    with pytest.raises(MethodFieldError, match=r"similar=1\.5 is not possible"):
        ZERO(similar=1.5)
