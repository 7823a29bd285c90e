"""Clusters around density peaks: by hand and as specified."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from vlmprune.prune.ops.clusters import density_clusters, merged_clusters


def line(*places: float, width: int = 1) -> torch.Tensor:
    return torch.tensor(places)[:, None].repeat(1, width)


@pytest.mark.parametrize("width", [1, 4])
def test_density_peaks_by_hand(width):
    """Five points have a neighbour at 1, and equal densities: the lower index is denser. Reaches
    are then 30 (the largest distance), 1, 1, 8, 1 and 19, the last one's density next to nothing.
    """
    clusters = density_clusters(line(0, 1, 2, 10, 11, 30, width=width), 2)
    assert clusters.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_lonely_point_is_no_centre():
    """Its reach of 47 is nothing beside a density of exp(-47^2 / 2)."""
    assert density_clusters(line(50, 0, 1, 2, 3), 2).tolist() == [1, 0, 1, 1, 1]


def test_the_foremost_centre_is_the_first_row():
    """Three nearest: mean squares 5/3, 2/3, 5/3 and .02/3 x (5, 2, 5): the small group leads."""
    points = line(0, 1, 2, 9, 9.1, 9.2)
    assert density_clusters(points, 3).tolist()[4] == 0
    rows, pairs = merged_clusters(points, 2)
    torch.testing.assert_close(rows, line(9.1, 1.0), rtol=1e-5, atol=0)
    assert pairs.tolist() == [[0, 0, 0, 1, 1, 1], [3, 4, 5, 0, 1, 2]]


def test_equal_points_are_told_apart_by_index():
    for count in (1, 2, 7):
        owner = density_clusters(torch.full((7, 3), 2.5), count)
        assert owner.tolist() == [*range(count), *[0] * (7 - count)]


def test_far_apart_points_have_densities_too():
    """All densities of these are 0 in float32, where the official noise chooses. The last two are
    the densest, by far: their distance to others counts for little."""
    points = 1000 * line(0, 2, 5, 10, 11, 30)
    assert density_clusters(points, 2).tolist() == [0, 0, 0, 0, 1, 1]


def reference(points: torch.Tensor, count: int) -> list[int]:
    """The specification's steps one by one, in double precision, densities by their logarithm."""
    rows, width = points.double().tolist(), points.shape[1]
    number = range(len(rows))
    apart = [[math.dist(one, two) / math.sqrt(width) for two in rows] for one in rows]
    density = [-sum(sorted(d * d for d in apart[i])[:count]) / count for i in number]
    score = []
    for i in number:
        denser = [apart[i][j] for j in number if (density[j], -j) > (density[i], -i)]
        reach = min(denser) if denser else max(map(max, apart))
        score.append(density[i] + (math.log(reach) if reach else -math.inf))
    centres = sorted(number, key=lambda i: -score[i])[:count]
    owner = [min(range(count), key=lambda c: apart[i][centres[c]]) for i in number]
    for cluster, centre in enumerate(centres):
        owner[centre] = cluster
    return owner


@pytest.mark.parametrize("seed", range(30))
def test_clusters_as_specified(seed):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 60, (), generator=generator))
    points = torch.randn(size, 1 + seed % 9, generator=generator) * (1 + seed % 4)
    for count in {1, min(2, size), 1 + size // 10, size}:
        assert density_clusters(points, count).tolist() == reference(points, count)


def test_what_all_points_share_does_not_matter():
    """As a few dimensions of hidden states, which are large in every token."""
    points = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)).mul(64).round().div(64)
    shared = torch.zeros(8).index_fill(0, torch.tensor([3]), 2**14)
    assert torch.equal(density_clusters(points + shared, 5), density_clusters(points, 5))


@given(size=st.integers(1, 40), data=st.data(), copies=st.booleans())
@settings(deadline=None)
def test_no_cluster_is_empty(size, data, copies):
    count = data.draw(st.integers(1, size))
    points = torch.randn(size, 3, generator=torch.Generator().manual_seed(size))
    points = points[: size // 2 + 1].repeat(2, 1)[:size] if copies else points
    rows, (row, member) = merged_clusters(points, count)
    assert member.sort().values.tolist() == list(range(size))
    assert row.tolist() == sorted(row.tolist()) and set(row.tolist()) == set(range(count))
    for number in range(count):
        mine = points[member[row == number]].double()
        mean = mine.sum(0) / (len(mine) + 1e-6)
        torch.testing.assert_close(rows[number].double(), mean, rtol=1e-5, atol=1e-6)


def test_rows_are_summed_in_float32_and_cast_back():
    points = (torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) + 10).bfloat16()
    rows, _ = merged_clusters(points, 1)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows[0], (points.float().sum(0) / (64 + 1e-6)).bfloat16())
