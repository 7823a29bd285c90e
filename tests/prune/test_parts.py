"""Parts of an image: fair shares, the best of each, regions of crops."""

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.tiles import CPU
from kit.tilings import TILINGS
from vlmprune.prune.ops.parts import apportion, canvas_of, sums_of_crops, tile_numbers, top_of_each
from vlmprune.prune.tiling import Block, Tiling


def fair(total: int, weights: list[int], sizes: list[int]) -> list[int]:
    """`apportion` in exact numbers: fill up part by part, then the largest remainders."""
    weights = [Fraction(w) for w in weights]
    quotas, free = [Fraction(0)] * len(sizes), set(range(len(sizes)))
    left = Fraction(total)
    while left and any(weights[i] for i in free):
        heavy = sum(weights[i] for i in free)
        over = {i for i in free if weights[i] and left * weights[i] >= heavy * sizes[i]}
        for i in over or free:
            quotas[i] = Fraction(sizes[i]) if over else left * weights[i] / heavy
        free -= over or free
        left = total - sum(quotas)
    room = [size - quota for size, quota in zip(sizes, quotas, strict=True)]
    if left:
        quotas = [q + left * r / sum(room) for q, r in zip(quotas, room, strict=True)]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_apportion_is_fair_and_exact(parts, share):
    weights, sizes = map(list, zip(*parts, strict=True))
    total = round(share * sum(sizes))
    counts = apportion(total, torch.tensor(weights), sizes).tolist()
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert counts == fair(total, weights, sizes)


@pytest.mark.parametrize(
    ("total", "weights", "sizes", "counts"),
    [
        (10, [1, 1, 1], [9, 9, 9], [4, 3, 3]),
        (10, [9, 1, 1], [4, 9, 9], [4, 3, 3]),  # what the first cannot take
        (10, [1, 0, 0], [4, 9, 3], [4, 5, 1]),  # by room where no weight is left
        (5, [0, 0], [4, 4], [3, 2]),
        (8, [1, 2], [4, 4], [4, 4]),
        (0, [1, 2], [4, 4], [0, 0]),
    ],
)
def test_apportion_by_hand(total, weights, sizes, counts):
    assert apportion(total, torch.tensor(weights), sizes).tolist() == counts


def test_apportion_with_a_priority():
    """Quotas 1.5, 2.7, 0.8: of 5, two are left, which remainders give to the last two."""
    weights = torch.tensor([1.5, 2.7, 0.8])
    assert apportion(5, weights, [9, 9, 9]).tolist() == [1, 3, 1]
    assert apportion(5, weights, [9, 9, 9], priority=weights).tolist() == [2, 3, 0]
    # quotas 2, 1.5, 0.5: whole numbers stay, and the heaviest gets the one that is left
    thirds = torch.tensor([4.0, 3, 1]) / 3
    assert apportion(4, thirds, [9, 9, 9], priority=thirds).tolist() == [3, 1, 0]
    # the heaviest is full: the spare one goes to the next
    assert apportion(4, weights, [9, 2, 9], priority=weights).tolist() == [2, 2, 0]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_top_of_each_part(tokens):
    scores, parts = zip(*tokens, strict=True)
    counts = [(parts.count(part) + 1) // 2 for part in range(4)]
    found = top_of_each(
        torch.tensor(scores), torch.tensor(parts), torch.tensor(counts), sum(counts)
    )
    expected = []
    for part in range(4):
        inside = [i for i in range(len(parts)) if parts[i] == part]
        expected += sorted(inside, key=lambda i: (-scores[i], i))[: counts[part]]
    assert found.tolist() == expected


def test_tiles_of_tokens():
    tiling = Tiling((Block((1,), (2,)), Block((1, 1), (2, 0, 1))))
    assert tile_numbers(tiling, CPU).tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert canvas_of(tiling) == tiling.blocks[1]
    for name in ("plain", "line", "video", "one crop"):
        assert canvas_of(TILINGS[name]) is None


def test_regions_of_crops():
    thumbnail = torch.tensor([[1.0, 10], [2, 20], [4, 40]])
    assert sums_of_crops(thumbnail, (2, 1), (1, 1)).tolist() == [3, 30, 4, 40]
    # the border of two rows of crops runs through the middle row; a lost tile has no region
    assert sums_of_crops(thumbnail, (5, 5), (7, 0)).tolist() == [22, 55]
    assert sums_of_crops(thumbnail, (1, 8), (3, 1)).sum() == pytest.approx(77)
