"""Operations of methods that merge tokens: the rest, the top, bags."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from vlmprune.prune.ops.merge import bags, complement, top_set
from vlmprune.prune.ops.topk import top_k


@given(st.integers(0, 12), st.integers(0, 2**31))
def test_complement(count, seed):
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(12, generator=generator)[:count]
    assert complement(some, 12).tolist() == sorted(set(range(12)) - set(some.tolist()))


@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_top_set_is_the_stable_top_k(k, distinct, seed):
    scores = torch.randint(distinct, (5, 9), generator=torch.Generator().manual_seed(seed)).float()
    scores[1, 2] = -torch.inf
    assert torch.equal(top_set(scores, k), top_k(scores, k).sort().values)


def test_bags():
    features = torch.tensor([[1.0, 2], [3, 5], [7, 11]])
    members, starts = torch.tensor([0, 2, 1]), torch.tensor([0, 2, 2])
    assert bags(features, members, starts).tolist() == [[4, 6.5], [0, 0], [3, 5]]
    weights = torch.tensor([2, 0.5, -1.0])
    assert bags(features, members, starts, weights).tolist() == [[5.5, 9.5], [0, 0], [-3, -5]]
