"""EViT: against the authors' reorganisation, by hand, its blocks and its counts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import inside
from kit.golden import Runner
from vlmprune.prune.contract import BlockCut, ClsAttention, ReceivedAttention, Tower
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.registry import method, method_class

EVIT = method_class("evit")


def compare(golden, evit):
    """One cut; the authors' rows stand by falling attention."""
    params, arrays = golden.params, golden.arrays
    tower, x = Tower(num_layers=12, has_cls=True, prefix=1), arrays["x"][1:]
    rows = inside.given(evit, tower, arrays["cls_attn_heads"].mean(0))
    kept, order = arrays["kept"].sort()
    keep = len(kept) + (evit.fuse and len(kept) < rows.count)
    if params["tokens"] is None:
        assert evit.block_counts(tower, rows.count, None)[0] == keep
    if keep == rows.count == len(kept):
        assert torch.equal(arrays["x_out"], arrays["x"])
        return
    made = inside.checked(evit, rows, keep)
    assert made.source[0, : len(kept)].tolist() == kept.tolist()
    if evit.fuse:
        inside.assert_partition(made, rows)
        order = torch.cat([order, torch.tensor([len(kept)])])
    wanted = arrays["x_out"][1:][order]
    torch.testing.assert_close(made.apply(x[None])[0], wanted, rtol=1e-4, atol=1e-5)


GOLDEN = {
    "evit": Runner(
        "evit",
        lambda p: {"rate": p["keep_rate"], "fuse": p["fuse_token"], "layers": (3,)},
        compare,
    )
}
ATTENTION = torch.tensor([0.125, 0.25, 0.0625, 0.25, 0.03125])


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_evit_by_hand(keep):
    """Rows 1 and 3 are the most attended, then 0; the rest is a sum, not a mean."""
    rows = inside.given(EVIT(), inside.TOWERS["deit"], ATTENTION)
    made = inside.checked(EVIT(), rows, keep)
    inside.assert_partition(made, rows)
    kept = [[], [1], [1, 3], [0, 1, 3]][keep - 1]
    assert made.source.tolist() == [[*kept, -1]]
    values = torch.tensor([16.0, 32, 64, 128, 256])
    fused = sum(float(values[i] * ATTENTION[i]) for i in range(5) if i not in kept)
    assert made.apply(values[None]).tolist() == [[*values[kept].tolist(), fused]]
    assert made.sizes(rows.sizes).tolist() == [[*[1] * len(kept), 5 - len(kept)]]


def test_evit_without_fusing():
    evit = EVIT(fuse=False)
    made = inside.checked(evit, inside.given(evit, inside.TOWERS["deit"], ATTENTION), 3)
    assert made.source.tolist() == [[0, 1, 3]]
    assert made.owner is None


def test_evit_without_cls_weighs_by_the_mean_row():
    """Received attention is summed over rows: the fused row is no larger than under CLS."""
    rows = inside.given(EVIT(), inside.TOWERS["siglip"], 5 * ATTENTION)
    made = inside.checked(EVIT(), rows, 3)
    assert made.source.tolist() == [[1, 3, -1]]
    torch.testing.assert_close(made.weights[0, [0, 2, 4]], ATTENTION[[0, 2, 4]])


@pytest.mark.parametrize(
    ("tower", "blocks"),
    [
        ("deit", (3, 6, 9)),
        ("clip", (6, 12, 18)),
        ("siglip", (7, 14, 20)),
        ("windowed", (7, 15, 23)),
        ("tiny", (0,)),
    ],
)
def test_evit_blocks(tower, blocks):
    tower = inside.TOWERS[tower]
    assert EVIT().blocks(tower) == tuple(BlockCut(block, "mlp") for block in blocks)
    kind = ClsAttention if tower.has_cls else ReceivedAttention
    assert [n for cut in EVIT().blocks(tower) for n in EVIT().reads(cut, tower)] == [
        kind(block) for block in blocks
    ]


def test_evit_blocks_of_the_user():
    assert EVIT(layers=(2, -2)).blocks(inside.TOWERS["deit"]) == (BlockCut(2), BlockCut(10))
    for layers, tower in (((3, 2), "deit"), ((3, 23), "clip"), ((7, 8), "windowed")):
        with pytest.raises(MethodFieldError, match="give ascending ones of"):
            EVIT(layers=layers).blocks(inside.TOWERS[tower])
    with pytest.raises(MethodFieldError, match=r"use 0\.\.11"):
        EVIT(layers=(12,)).blocks(inside.TOWERS["deit"])


def test_evit_fuses_where_rows_have_no_position():
    assert EVIT().fuses(inside.TOWERS["clip"])
    assert not EVIT(fuse=False).fuses(inside.TOWERS["clip"])
    assert not EVIT().fuses(inside.TOWERS["windowed"])
    with pytest.raises(MethodFieldError, match="a fused row has none: leave it out"):
        EVIT(fuse=True).blocks(inside.TOWERS["windowed"])


def test_evit_published_counts():
    """As of the README: 138, 98 and 70 of 196 patches, and the fused row."""
    deit = inside.TOWERS["deit"]
    assert EVIT().block_counts(deit, 196, None) == (139, 99, 71)
    assert EVIT(rate=0.5, fuse=False).block_counts(deit, 196, None) == (98, 49, 25)
    assert EVIT(rate=1.0).block_counts(deit, 196, None) == (196, 196, 196)


@given(st.sampled_from(sorted(inside.TOWERS)), st.integers(1, 700), st.data())
def test_evit_counts_are_exact(tower, rows, data):
    tower = inside.TOWERS[tower]
    keep = data.draw(st.integers(1, rows))
    counts = EVIT().block_counts(tower, rows, keep)
    assert counts[-1] == keep
    assert list(counts) == sorted(counts, reverse=True) and counts[0] <= rows
    assert len(counts) == len(EVIT().blocks(tower))
    for one, two in zip((rows, *counts), counts, strict=False):
        assert abs(math.log(two / one) - math.log(keep / rows) / len(counts)) < 2 / two


@given(
    st.sampled_from(inside.PLAIN),
    st.integers(2, 60),
    st.integers(0, 2**31),
    st.booleans(),
    st.data(),
)
def test_evit_keeps_exactly(tower, count, seed, fuse, data):
    evit, keep = EVIT(fuse=fuse), data.draw(st.integers(1, count - 1))
    rows = inside.drawn(evit, inside.TOWERS[tower], count, batch=3, seed=seed)
    made = inside.checked(evit, rows, keep)
    kept = made.source[:, : keep - fuse]
    assert torch.equal(kept, kept.sort(1).values)
    if fuse:
        inside.assert_partition(made, rows)


def test_evit_ties_go_to_the_lower_row():
    rows = inside.given(EVIT(), inside.TOWERS["deit"], torch.full((9,), 0.1))
    assert inside.checked(EVIT(), rows, 4).source.tolist() == [[0, 1, 2, -1]]


def test_evit_is_given_a_rate_or_a_budget():
    assert method("evit").adaptive and method("evit", rate=0.5).adaptive
    assert not method("evit", keep_tokens=64).adaptive
    with pytest.raises(BudgetError, match=r"keep_tokens=64 and rate=0\.7, .* leave one of them"):
        method("evit", rate=0.7, keep_tokens=64)


@pytest.mark.parametrize("fields", [{"rate": 0}, {"rate": 1.5}, {"fuse": 1}, {"layers": 3}])
def test_evit_refuses_impossible_fields(fields):
    with pytest.raises(MethodFieldError, match="is not possible"):
        EVIT(**fields)
