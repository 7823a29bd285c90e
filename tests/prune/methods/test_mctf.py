"""MCTF: against the authors' fusion and its attention, by hand, its blocks and its counts."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import inside
from kit.golden import Runner
from torch import Tensor
from vlmprune.prune.blocks import merging
from vlmprune.prune.contract import Reduction, Tower
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.registry import method, method_class

MCTF = method_class("mctf")
POOLINGS = {0: "size", 1: "attention", 3: "even"}


def compare(golden, mctf):
    """One fusion, what became of the rows, and the attention that the block has then."""
    arrays, prefix = golden.arrays, golden.params["num_protected"]
    tower = Tower(num_layers=12, has_cls=prefix > 0, prefix=prefix)
    x, attention = arrays["x"][prefix:], arrays["attn"]
    sizes = arrays.get("size_in", torch.ones(len(arrays["x"]))).flatten()[prefix:]
    (keep, *_) = mctf.block_counts(tower, len(x), None)
    assert keep + prefix == len(arrays["x_out"])
    if keep == len(x):
        assert torch.equal(arrays["x_out"], arrays["x"])
        return
    received = attention.mean(0).sum(0)[prefix:]
    rows = inside.given(mctf, tower, x, received, sizes=sizes)
    made = inside.checked(mctf, rows, keep)
    inside.assert_partition(made, rows)
    owner = [*range(prefix), *(made.owner[0] + prefix).tolist()]
    assert owner == arrays["assign"].tolist()
    close(made.apply(x[None])[0], arrays["x_out"][prefix:])
    close(made.sizes(sizes[None])[0], arrays["size_out"].flatten()[prefix:])
    if "attn_out" in arrays:
        averaged, members = maps(made, prefix)
        close(averaged @ attention @ members.T, arrays["attn_out"])


def maps(made: Reduction, prefix: int) -> tuple[Tensor, Tensor]:
    """What averages rows, and what sums the columns of a row's members: (K, N), prefix included."""
    members = torch.nn.functional.one_hot(made.owner[0], made.count).T.float()
    weights = members if made.weights is None else members * made.weights
    front = torch.eye(prefix)
    return tuple(
        torch.block_diag(front, of_rows)
        for of_rows in (weights / weights.sum(1, keepdim=True), members)
    )


def close(ours: Tensor, golden: Tensor) -> None:
    torch.testing.assert_close(ours, golden, rtol=1e-4, atol=1e-5)


GOLDEN = {
    "mctf": Runner(
        "mctf",
        lambda p: {
            "r": p["r"],
            "tau_sim": p["tau_sim"],
            "tau_info": p["tau_info"],
            "tau_size": p["tau_size"],
            "bidirectional": bool(p["bidirection"]),
            "pooling": POOLINGS[p["pooling_type"]],
        },
        compare,
    )
}
X = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0.1, 1], [1, 0.2], [-1, 1]])
"""Behind CLS rows 1, 3 and 5 are one side, 0, 2 and 4 the other."""


def hand(received=None, sizes=None, **fields) -> tuple[list[int], list[int]]:
    mctf = MCTF(**fields)
    received = torch.ones(6) if received is None else torch.tensor(received)
    rows = inside.given(
        mctf,
        inside.TOWERS["deit"],
        X,
        received,
        sizes=None if sizes is None else torch.tensor(sizes),
    )
    made = inside.checked(mctf, rows, 4)
    inside.assert_partition(made, rows)
    return made.source[0].tolist(), made.owner[0].tolist()


def test_mctf_both_ways_by_hand():
    """3 merges into 2 (cosine .77); then, of the other side, 2 is the nearest to what is left: to 1
    and to 5 alike but for the angle, .71 and 0, and takes 3 with it into 1."""
    assert hand() == ([1, 5, 4, 0], [3, 0, 0, 0, 2, 1])


def test_mctf_one_way_by_hand():
    assert hand(bidirectional=False) == ([5, 0, 2, 4], [1, 2, 2, 2, 3, 0])


def test_mctf_spares_what_is_attended():
    """With much attention on 2, rows 1 and 3 find another partner."""
    received = [1.0, 1, 1e30, 1, 1, 1]
    assert hand(received, bidirectional=False) == ([5, 0, 2, 4], [1, 3, 2, 3, 3, 0])
    assert hand(received, bidirectional=False, tau_info=0) == hand(bidirectional=False)


def test_mctf_spares_what_is_large():
    sizes = [1.0, 1, 2.0**40, 1, 1, 1]
    assert hand(None, sizes, bidirectional=False) == ([5, 0, 2, 4], [1, 3, 2, 3, 3, 0])
    assert hand(None, sizes, bidirectional=False, tau_size=0) == hand(bidirectional=False)


def test_mctf_without_any_factor_goes_by_number():
    fields = {"tau_sim": 0, "tau_info": 0, "tau_size": 0, "bidirectional": False}
    assert hand(**fields) == ([5, 0, 2, 4], [1, 1, 2, 1, 3, 0])


def test_mctf_weighs_by_attention_and_patches():
    received, sizes = torch.tensor([3.0, 1]), torch.tensor([1.0, 5])
    for pooling, wanted in (("attention", 5 / 8), ("size", 5 / 6), ("even", 1 / 2)):
        mctf = MCTF(pooling=pooling)
        rows = inside.given(mctf, inside.TOWERS["siglip"], X[:2], received, sizes=sizes)
        made = inside.checked(mctf, rows, 1)
        assert made.apply(torch.tensor([[0.0, 1]])).item() == pytest.approx(wanted)


def test_mctf_rows_without_attention_stay_numbers():
    mctf = MCTF()
    rows = inside.given(mctf, inside.TOWERS["deit"], X, torch.tensor([0.0, 0, 0, 1, 1, 1]))
    made = inside.checked(mctf, rows, 4)
    assert bool(made.apply(X[None]).isfinite().all())


@pytest.mark.parametrize(
    ("tower", "blocks"),
    [
        ("deit", range(1, 12)),
        ("clip", range(2, 23)),
        ("siglip", range(2, 27)),
        ("windowed", (7, 15, 23, 31)),
        ("tiny", range(1)),
    ],
)
def test_mctf_blocks(tower, blocks):
    found = MCTF().blocks(inside.TOWERS[tower])
    assert [cut.block for cut in found] == list(blocks)
    assert {cut.at for cut in found} == {"mlp"}


def test_mctf_published_counts():
    """16 of 196 patches in 11 blocks; 35 %; 10 rows are left, unless half of 10 patches merge."""
    deit, siglip = inside.TOWERS["deit"], inside.TOWERS["siglip"]
    assert MCTF().block_counts(deit, 196, None) == tuple(range(180, 19, -16))
    assert MCTF(r=0.35).block_counts(deit, 149, None)[0] == 149 - 52
    assert MCTF(r=0.9).block_counts(deit, 40, None)[:4] == (20, 10, 5, 5)
    assert MCTF().block_counts(deit, 24, None)[:3] == (12, 9, 9)
    assert MCTF().block_counts(siglip, 24, None)[:3] == (12, 10, 10)
    assert MCTF(r=1).block_counts(deit, 7, None) == (7,) * 11


@given(st.sampled_from(sorted(inside.TOWERS)), st.integers(1, 700), st.data())
def test_mctf_counts_are_exact_or_out_of_reach(tower, rows, data):
    tower, keep = inside.TOWERS[tower], data.draw(st.integers(1, rows))
    blocks = len(MCTF().blocks(tower))
    least = merging(rows, [rows] * blocks)[-1]
    if keep < least:
        with pytest.raises(BudgetError, match=f"mctf cannot merge .* nearest count is {least}"):
            MCTF().block_counts(tower, rows, keep)
        return
    counts = MCTF().block_counts(tower, rows, keep)
    assert counts[-1] == keep and len(counts) == blocks
    for one, two in zip((rows, *counts), counts, strict=False):
        assert one - one // 2 <= two <= one


@given(
    st.sampled_from(sorted(inside.TOWERS)),
    st.integers(2, 60),
    st.integers(0, 2**31),
    st.booleans(),
    st.booleans(),
    st.data(),
)
def test_mctf_partitions_rows(tower, count, seed, sized, both, data):
    mctf, keep = MCTF(bidirectional=both), data.draw(st.integers(count - count // 2, count - 1))
    rows = inside.drawn(mctf, inside.TOWERS[tower], count, batch=3, seed=seed, sized=sized)
    inside.assert_partition(inside.checked(mctf, rows, keep), rows)


def slowly(x: Tensor, received: Tensor, sizes: Tensor, prefix: int, one: int, back: int):
    """The members of each new row, in order, by products of factors as published."""
    x, received, sizes = x.double(), received.double(), sizes.double()
    info = 1 / (received / len(x))
    info, small = info / info.max(), sizes.min() / sizes

    def score(a: int, b: int) -> float:
        if min(a, b) < prefix:
            return -math.inf
        a, b = a - prefix, b - prefix
        likeness = (torch.cosine_similarity(x[a], x[b], 0) + 1) / 2
        return float(likeness * (info[a] * info[b]) ** 0.05 * (small[a] * small[b]) ** 0.025)

    evens, odds = (list(range(first, len(x) + prefix, 2)) for first in (0, 1))
    scores = {(a, b): score(a, b) for a in evens for b in odds}
    best = {a: max(odds, key=lambda b: scores[a, b]) for a in evens}
    order = sorted(evens, key=lambda a: -scores[a, best[a]])
    into = {a: best[a] for a in order[:one]}
    left = sorted(order[one:]) if prefix else order[one:]
    host = {b: max(left, key=lambda a: scores[a, b]) for b in odds}
    order = sorted(odds, key=lambda b: -scores[host[b], b]) if back else odds
    into |= {b: host[b] for b in order[:back]}
    members = {n: [n] for n in [*left, *order[back:]]}
    for n in into:
        end = n
        while end in into:
            end = into[end]
        members[end].append(n)
    return [sorted(n - prefix for n in group) for m, group in members.items() if m >= prefix]


@given(st.sampled_from([0, 1]), st.integers(3, 30), st.integers(0, 2**31), st.booleans(), st.data())
def test_mctf_equals_a_slow_reading(prefix, count, seed, both, data):
    merged = data.draw(st.integers(1, count // 2))
    mctf, tower = MCTF(bidirectional=both), Tower(num_layers=2, has_cls=prefix > 0, prefix=prefix)
    rows = inside.drawn(mctf, tower, count, batch=1, seed=seed, sized=True)
    made = inside.checked(mctf, rows, count - merged)
    groups = [(made.owner[0] == new).nonzero().flatten().tolist() for new in range(made.count)]
    back = merged - merged // 2 if both else 0
    x, received = (value[0] for value in rows.signals.values())
    assert groups == slowly(x, received, rows.sizes[0], prefix, merged - back, back)


def test_mctf_is_given_r_or_a_budget():
    assert method("mctf").adaptive and method("mctf", r=0.35).adaptive
    assert not method("mctf", keep_ratio=0.5).adaptive
    with pytest.raises(BudgetError, match=r"keep_ratio=0\.5 and r=8, .* leave one of them out"):
        method("mctf", r=8, keep_ratio=0.5)


@pytest.mark.parametrize(
    "fields", [{"r": 0}, {"r": 1.5}, {"tau_sim": -1}, {"bidirectional": 1}, {"pooling": "max"}]
)
def test_mctf_refuses_impossible_fields(fields):
    with pytest.raises(MethodFieldError, match="is not possible"):
        MCTF(**fields)
