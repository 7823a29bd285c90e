"""Greedy operations: determinants, dispersion, cover, against plain readings."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.greedy import best_determinants, cover, disperse, rand, unit_of
from vlmprune.prune.ops import cosine, facility
from vlmprune.prune.ops.cosine import gram
from vlmprune.prune.ops.dispersion import greedy_dispersion
from vlmprune.prune.ops.dpp import greedy_map, weighted_cosines, weighted_greedy_map
from vlmprune.prune.ops.facility import greedy_cover


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 31, 64, 101])
def test_gram_multiplies_all_pairs(size, monkeypatch):
    monkeypatch.setattr(cosine, "_LEAF", 8)
    rows = rand(size, size, 5)
    torch.testing.assert_close(gram(rows), rows @ rows.T)


def test_greedy_map_maximises_determinants():
    weights = torch.stack([rand(s + 50, 24).abs() + 0.1 for s in range(4)])
    kernels = weighted_cosines([rand(s, 24, 12) for s in range(4)], weights)
    picks = greedy_map(kernels, 9, torch.zeros(4, 24))
    assert picks.tolist() == [best_determinants(kernel, 9) for kernel in kernels]
    for fewer in (1, 5):
        assert torch.equal(greedy_map(kernels, fewer, torch.zeros(4, 24)), picks[:, :fewer])


def test_kernel_by_definition():
    features, weights = rand(1, 10, 6), rand(2, 10).abs()
    unit = unit_of(features)
    expected = weights[:, None] * (unit @ unit.T) * weights
    (kernel,) = weighted_cosines([features], weights[None])
    torch.testing.assert_close(kernel.double(), expected.double())


@pytest.mark.parametrize("stored", [True, False])
def test_weighted_greedy_map_with_and_without_its_kernels(stored, monkeypatch):
    """Three images of which a part holds two; one has a token of zeros and one of no weight."""
    monkeypatch.setattr(cosine, "STORE_UP_TO", 40 if stored else 0)
    images = [rand(s, 28, 40) for s in range(3)]
    weights = torch.stack([rand(s + 50, 28).abs() + 0.1 for s in range(3)])
    images[1][3], weights[1, 5] = 0, 0
    picks = weighted_greedy_map(images, weights, 28)
    for found, kernel in zip(picks, weighted_cosines(images, weights), strict=True):
        assert sorted(found.tolist()) == list(range(28))
        assert found[:26].tolist() == best_determinants(kernel, 26)
    assert picks[1, 26:].tolist() == [3, 5], "by weight"


def test_greedy_map_goes_on_where_the_rank_ends():
    """Three directions, each of them twice: then the others, by what is given for them."""
    kernel = torch.eye(3).repeat(2, 2)
    kernel[0, 0] = kernel[3, 3] = kernel[0, 3] = kernel[3, 0] = 4
    fallback = torch.tensor([0, 0, 0, 0.5, 0.9, 0.7])
    other = torch.eye(6)
    picks = greedy_map(torch.stack([kernel, other]), 6, torch.stack([fallback, fallback]))
    assert picks.tolist() == [[0, 1, 2, 4, 5, 3], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_greedy_map_never_repeats_a_token(rank, stored, monkeypatch):
    """The same up to rounding, which makes some of what is left positive."""
    monkeypatch.setattr(cosine, "STORE_UP_TO", 1000 if stored else 0)
    features = rand(rank, 30, rank) @ rand(rank + 1, rank, 16)
    weights = rand(3, 30).abs() + 0.1
    (kernel,) = weighted_cosines([features], weights[None])
    picks = weighted_greedy_map([features], weights[None], 30)[0].tolist()
    assert sorted(picks) == list(range(30))
    assert picks[:rank] == best_determinants(kernel, rank)


@pytest.mark.parametrize("rule", ["max_sum", "k_center"])
@pytest.mark.parametrize("stored", [True, False])
def test_dispersion_is_the_plain_one(rule, stored, monkeypatch):
    monkeypatch.setattr(cosine, "STORE_UP_TO", 1000 if stored else 0)
    for seed in range(5):
        features = rand(seed, 40, 10)
        picks = greedy_dispersion([features], torch.tensor([seed + 3]), 39, rule)[0]
        assert picks.tolist() == disperse(features, seed + 3, 39, rule)


@pytest.mark.parametrize("path", ["changed rows", "all rows", "not stored"])
def test_cover_is_the_plain_one(path, monkeypatch):
    monkeypatch.setattr(facility, "_BLOCK", 16)
    monkeypatch.setattr(cosine, "STORE_UP_TO", 0 if path == "not stored" else 1000)
    monkeypatch.setattr(facility, "_reads_all", lambda unit: path == "all rows")
    for seed in range(4):
        features, text = rand(seed, 40, 12), rand(seed + 9, 5, 12)
        bonus = (unit_of(features) @ unit_of(text.mean(0, keepdim=True))[0] + 1) / 2
        picks = greedy_cover(unit_of(features).float(), 0.7 * bonus.float(), 30)
        assert picks.tolist() == cover(features, text, 30)


@given(
    st.integers(2, 24), st.floats(0, 1), st.floats(0, 5), st.integers(0, 4), st.integers(0, 2**31)
)
def test_every_pick_of_cover_adds_most(num_tokens, part, weight, words, seed):
    """Up to float32: of two tokens that add the same to six digits, either may be first."""
    features, text = rand(seed, num_tokens, 6), rand(seed + 1, words, 6)
    unit = unit_of(features)
    bonus = weight * (unit @ unit_of(text.mean(0, keepdim=True))[0] + 1) / 2
    bonus = bonus if words else torch.zeros(num_tokens)
    similar, covered = (unit @ unit.T + 1) / 2, torch.zeros(num_tokens)
    picks = greedy_cover(unit.float(), bonus, max(1, round(part * num_tokens))).tolist()
    assert len(set(picks)) == len(picks)
    for i, pick in enumerate(picks):
        gains = (similar - covered).clamp_min(0).sum(1) + bonus
        gains[picks[:i]] = -torch.inf
        assert gains[pick] >= gains.max() - 1e-5
        covered = torch.maximum(covered, similar[pick])


@pytest.mark.parametrize("stored", [True, False])
def test_cover_breaks_ties_by_index(stored, monkeypatch):
    """Two tokens stand for each other equally, whatever rounding makes of their length."""
    monkeypatch.setattr(cosine, "STORE_UP_TO", 1000 if stored else 0)
    for seed in range(20):
        unit = unit_of(rand(seed, 2, 6)).float()
        assert greedy_cover(unit, torch.zeros(2), 1).tolist() == [0]
