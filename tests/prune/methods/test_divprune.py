"""DivPrune: max-min against a plain reading."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.golden import Golden, Runner, assert_equal, choose
from torch import Tensor
from vlmprune.prune.contract import Features, Method
from vlmprune.prune.ops import cosine, maxmin
from vlmprune.prune.ops.maxmin import greedy_max_min


def _divprune(golden: Golden, method: Method) -> None:
    features, order = golden.arrays["features"], golden.arrays["select_order"]
    low, high = golden.params.get("duplicate_group", (0, 0))

    def canonical(indices: Tensor) -> Tensor:
        """Any member of the duplicates stands for all of them."""
        return indices.where((indices < low) | (indices >= high), low)

    kept = choose(method, {Features(): features}, len(order)).kept
    assert_equal(canonical(kept), canonical(golden.arrays["kept"]))
    assert_equal(canonical(greedy_max_min([features], len(order))[0]), canonical(order))


GOLDEN = {
    "divprune": Runner("divprune", lambda p: {}, _divprune),
}


def published_max_min(features: torch.Tensor, count: int) -> list[int]:
    """The published steps, read literally: every pick looks at all earlier picks again."""
    unit = features / features.norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    picks: list[int] = []
    for _ in range(count):
        if picks:
            score = distance[picks].amin(0)
        else:
            score = distance.topk(2, dim=0, largest=False).values[1]
        picks.append(int(score.argmax()))
    return picks


@given(st.integers(2, 60), st.floats(0, 1), st.integers(2, 24), st.integers(0, 2**31))
def test_every_pick_is_the_farthest(num_tokens, share, width, seed):
    """Up to float32: of two tokens equally far to six digits, either may be first."""
    features = torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))
    picks = greedy_max_min([features], max(1, round(share * num_tokens)))[0].tolist()
    assert len(set(picks)) == len(picks)
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    distance = 1 - unit @ unit.T
    scores = distance.topk(2, dim=0, largest=False).values[1]
    for i, pick in enumerate(picks):
        assert scores[pick] >= scores.max() - 1e-6
        scores = distance[picks[: i + 1]].amin(0)


@pytest.mark.parametrize("stored", [True, False])
def test_max_min_is_the_published_one(stored, monkeypatch):
    """With more tokens than a block holds, with and without the distances in memory."""
    monkeypatch.setattr(maxmin, "_BLOCK", 32)
    monkeypatch.setattr(cosine, "STORE_UP_TO", 10_000 if stored else 0)
    features = torch.randn(150, 16, generator=torch.Generator().manual_seed(1))
    assert greedy_max_min([features], 60)[0].tolist() == published_max_min(features.double(), 60)


@pytest.mark.parametrize("stored", [True, False])
def test_max_min_never_repeats_a_token(stored, monkeypatch):
    """Ten distinct tokens, twenty wanted: the official code repeats some, here all are unique."""
    monkeypatch.setattr(cosine, "STORE_UP_TO", 10_000 if stored else 0)
    distinct = torch.randn(10, 6, generator=torch.Generator().manual_seed(2))
    features = distinct.repeat(4, 1)
    picks = greedy_max_min([features], 25)[0].tolist()
    assert len(set(picks)) == 25
    assert {pick % 10 for pick in picks[:10]} == set(range(10)), "one of each first"


def test_max_min_survives_a_token_of_zeros():
    features = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))
    features[5] = 0
    picks = greedy_max_min([features], 7)[0]
    assert len(set(picks.tolist())) == 7
