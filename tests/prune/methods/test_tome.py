"""ToMe: against the authors' merges, by hand, counts from sizes alone, which rows it partitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import inside
from kit.golden import Runner
from torch import Tensor
from vlmprune.prune.blocks import merging
from vlmprune.prune.contract import BlockCut, Keys, Tower
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.registry import method, method_class

TOME = method_class("tome")


def compare(golden, tome):
    """Several merges, each of what the one before left."""
    prefix = golden.params["class_token"] + golden.params["distill_token"]
    layers = golden.params["layers"]
    tower = Tower(num_layers=layers, has_cls=prefix > 0, prefix=prefix)
    x = golden.arrays["x_in"][prefix:]
    sizes = golden.arrays.get("size_in", torch.ones(len(x) + prefix))[prefix:].flatten()
    into = torch.arange(len(x))
    counts = tome.block_counts(tower, len(x), None)
    for layer, keep in enumerate(counts):
        metric = golden.arrays[f"metric_{layer}"][prefix:]
        if keep < len(x):
            rows = inside.given(tome, tower, metric[:, None], sizes=sizes)
            made = inside.checked(tome, rows, keep)
            inside.assert_partition(made, rows)
            x, sizes = made.apply(x[None])[0], made.sizes(sizes[None])[0]
            into = made.owners(len(metric))[0][into]
        wanted = golden.arrays[f"x_out_{layer}"][prefix:]
        torch.testing.assert_close(x, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sizes, golden.arrays[f"size_out_{layer}"][prefix:].flatten())
    assert (into + prefix).tolist() == golden.arrays["assign"][prefix:].tolist()
    assert golden.arrays["assign"][:prefix].tolist() == list(range(prefix))


GOLDEN = {"tome": Runner("tome", lambda p: {"r": p["r"]}, compare)}


def test_tome_by_hand():
    """Behind CLS rows 1, 3 and 5 are candidates. 3 is row 4 but for its length, 1 is nearly 2."""
    keys = torch.tensor([[1.0, 0], [0.1, 1], [0, 1], [2, 2], [1, 1], [1, -1]])
    rows = inside.given(TOME(), inside.TOWERS["deit"], keys[:, None], sizes=torch.ones(6))
    made = inside.checked(TOME(), rows, 4)
    assert made.source.tolist() == [[5, 0, 2, 4]]
    assert made.owner.tolist() == [[1, 2, 2, 3, 3, 0]]
    values = torch.tensor([[1.0, 2, 4, 8, 16, 32]])
    assert made.apply(values).tolist() == [[32, 1, 3, 12]]


def test_tome_without_prefix_begins_with_the_first_row():
    """Rows 0, 2 and 4 are candidates; those that are left stand by falling likeness."""
    keys = torch.tensor([[1.0, 3], [1, 0], [1, 1], [1, 1.1], [1, 0.1], [0, -1]])
    rows = inside.given(TOME(), inside.TOWERS["siglip"], keys[:, None])
    made = inside.checked(TOME(), rows, 5)
    assert made.source.tolist() == [[4, 0, 1, 3, 5]]
    assert made.owner.tolist() == [[1, 2, 3, 3, 0, 4]]


def test_tome_averages_heads_and_weighs_patches():
    keys = torch.tensor([[[4.0, 0], [0, 4]], [[1, 1], [1, 1]], [[0, -1], [0, -1]]])
    sizes = torch.tensor([3.0, 1, 1])
    rows = inside.given(TOME(), inside.TOWERS["siglip"], keys, sizes=sizes)
    made = inside.checked(TOME(), rows, 2)
    assert made.apply(torch.tensor([[8.0, 4, 1]])).tolist() == [[1, 7]]
    assert made.sizes(rows.sizes).tolist() == [[1, 4]]


@pytest.mark.parametrize(
    ("tower", "blocks"),
    [
        ("clip", range(23)),
        ("siglip", range(27)),
        ("windowed", (7, 15, 23, 31)),
        ("tiny", range(1)),
    ],
)
def test_tome_merges_in_every_block_that_is_read(tower, blocks):
    assert TOME(r=1).blocks(inside.TOWERS[tower]) == tuple(BlockCut(b, "mlp") for b in blocks)


def test_tome_counts_of_published_settings():
    """The last of 12 blocks has 20 patches and merges half of them; 26 blocks of 54 x 54."""
    deit, siglip = inside.TOWERS["deit"], Tower(num_layers=26, has_cls=False)
    assert TOME(r=16).block_counts(deit, 196, None) == (*range(180, 19, -16), 10)
    assert TOME(r=84).block_counts(siglip, 54 * 54, None)[-1] == 732
    assert TOME(r=1000).block_counts(deit, 196, None)[:4] == (98, 49, 25, 13)


@given(st.sampled_from(sorted(inside.TOWERS)), st.integers(1, 700), st.data())
def test_tome_counts_are_exact_or_out_of_reach(tower, rows, data):
    tower = inside.TOWERS[tower]
    keep = data.draw(st.integers(1, rows))
    blocks = len(TOME().blocks(tower))
    least = merging(rows, [rows] * blocks)[-1]
    if keep < least:
        with pytest.raises(BudgetError, match=f"nearest count is {least}"):
            TOME().block_counts(tower, rows, keep)
        return
    counts = TOME().block_counts(tower, rows, keep)
    before = [rows, *counts[:-1]]
    merged = [one - two for one, two in zip(before, counts, strict=True)]
    assert counts[-1] == keep and len(counts) == blocks
    assert all(0 <= r <= n // 2 for r, n in zip(merged, before, strict=True))
    most = max(merged)
    if most:  # as few in a block as can be
        assert merging(rows, [most - 1] * blocks)[-1] > keep
        working = [(r, n) for r, n in zip(merged, before, strict=True) if r]
        assert all(r in (most, n // 2) for r, n in working[:-1])


@given(
    st.sampled_from(sorted(inside.TOWERS)),
    st.integers(2, 60),
    st.integers(0, 2**31),
    st.booleans(),
    st.data(),
)
def test_tome_partitions_rows(tower, count, seed, sized, data):
    keep = data.draw(st.integers(count - count // 2, count - 1))
    rows = inside.drawn(TOME(), inside.TOWERS[tower], count, batch=3, seed=seed, sized=sized)
    inside.assert_partition(inside.checked(TOME(), rows, keep), rows)


def slowly(keys: Tensor, prefix: int, merged: int) -> list[list[int]]:
    """The members of each new row, in order, of a sequence with protected rows in front."""
    keys = keys.double()
    protected = [None] * prefix
    rows = [*protected, *(key / key.norm() for key in keys)]
    targets = [n for n in range(1, len(rows), 2) if rows[n] is not None]
    nearest = {}
    for n in range(0, len(rows), 2):
        if rows[n] is not None:
            nearest[n] = max((float(rows[n] @ rows[m]), -m) for m in targets)
    order = sorted(nearest, key=lambda n: (-nearest[n][0], n))
    gone, left = order[:merged], order[merged:]
    members = {n: [n] for n in ([*sorted(left), *targets] if prefix else [*left, *targets])}
    for n in gone:
        members[-nearest[n][1]].append(n)
    return [sorted(n - prefix for n in group) for group in members.values()]


@given(st.integers(0, 5), st.integers(2, 30), st.integers(0, 2**31), st.data())
def test_tome_equals_a_slow_reading(prefix, count, seed, data):
    merged = data.draw(st.integers(1, count // 2))
    tower = Tower(num_layers=2, has_cls=prefix > 0, prefix=prefix)
    rows = inside.drawn(TOME(), tower, count, batch=1, seed=seed)
    made = inside.checked(TOME(), rows, count - merged)
    groups = [(made.owner[0] == new).nonzero().flatten().tolist() for new in range(made.count)]
    assert groups == slowly(rows.signals[Keys(0)][0].mean(1), prefix, merged)


def test_tome_ties_go_to_the_lower_row():
    rows = inside.given(TOME(), inside.TOWERS["deit"], torch.ones(9, 2, 3))
    made = inside.checked(TOME(), rows, 7)
    assert made.source.tolist() == [[5, 7, 0, 2, 4, 6, 8]]
    assert made.owner.tolist() == [[2, 2, 3, 2, 4, 0, 5, 1, 6]]


def test_tome_is_given_r_or_a_budget():
    assert method("tome", r=8).adaptive
    assert not method("tome", keep_ratio=0.5).adaptive
    with pytest.raises(BudgetError, match="tome needs a budget"):
        method("tome")
    with pytest.raises(BudgetError, match=r"keep_ratio=0\.5 and r=8, .* leave one of them out"):
        method("tome", r=8, keep_ratio=0.5)


@pytest.mark.parametrize("r", [0, -1, 2.5, "8", True])
def test_tome_refuses_other_numbers(r):
    with pytest.raises(MethodFieldError, match="give a whole number of rows"):
        TOME(r=r)
