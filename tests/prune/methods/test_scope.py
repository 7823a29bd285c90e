"""SCOPE: greedy coverage by attention against a plain reading, and its layer."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.drawn import make_tokens, shape_of
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from torch import Tensor
from torch.nn.functional import normalize
from vlmprune.prune.contract import ClsAttention, EncoderFeatures, Method, ReceivedAttention
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.ops import coverage
from vlmprune.prune.registry import method_class


def _scope(golden: Golden, method: Method) -> None:
    attention, _ = method.needs(CLIP_L)
    assert attention == ClsAttention(22)
    for tile in range(golden.params["tiles"]):
        signals = {
            attention: golden.arrays["cls_rows"][tile].sum(0),  # official: not their mean
            EncoderFeatures(): golden.arrays["features"][tile],
        }
        kept = choose(method, signals, golden.params["per_tile"]).kept
        assert_equal(kept, golden.arrays["kept"][tile])


GOLDEN = {
    "scope": Runner("scope", lambda p: {k: p[k] for k in ("alpha", "combined")}, _scope),
}


def _plain(attention: Tensor, features: Tensor, keep: int, alpha: float, combined: str) -> Tensor:
    """Every pair at every pick, in double precision."""
    unit = normalize(features.double(), dim=-1)
    alike = (unit @ unit.T).fill_diagonal_(1)
    covered, weights = torch.zeros(len(unit)).double(), attention.double() ** alpha
    picked: list[int] = []
    for _ in range(keep):
        gains = (alike - covered[:, None]).clamp_min(0).sum(0)
        scores = gains * weights if combined == "multi" else gains + weights
        scores[picked] = -torch.inf
        picked.append(int(scores.argmax()))
        covered = torch.maximum(covered, alike[picked[-1]])
    return torch.tensor(sorted(picked))


@given(
    rows=st.integers(2, 9),
    share=st.floats(0.05, 0.95),
    alpha=st.sampled_from([0.5, 1.0, 2.0]),
    combined=st.sampled_from(["multi", "add"]),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=40)
def test_a_plain_reading(rows, share, alpha, combined, seed):
    """Small images at once, and large ones one by one."""
    scope = method_class("scope")(alpha=alpha, combined=combined)
    tokens = make_tokens(scope, (rows, 7), seed=seed)
    keep = max(1, round(share * tokens.num_tokens))
    attention, features = (tokens.signals[need] for need in scope.needs(tokens.shape))
    found = _plain(attention, features, keep, alpha, combined)
    assert_equal(scope.select(tokens, keep).kept, found)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(coverage, "_AT_ONCE", 1)
        assert_equal(scope.select(tokens, keep).kept, found)


def test_without_attention_coverage_alone_decides():
    """Three tokens in one direction, one in another: the first pick covers three."""
    signals = {
        ClsAttention(22): torch.tensor([0.1, 0.1, 0.1, 0.9]),
        EncoderFeatures(): torch.tensor([[2.0, 0], [1, 0], [3, 0], [0, 1]]),
    }
    for alpha, kept in ((0.0, [0]), (1.0, [3])):
        assert choose(method_class("scope")(alpha=alpha), signals, 1).kept.tolist() == kept
    assert choose(method_class("scope")(alpha=0.0), signals, 2).kept.tolist() == [0, 3]


def test_layers_and_fields():
    cls = method_class("scope")
    assert cls().needs(shape_of()) == (ClsAttention(22), EncoderFeatures())
    received = cls(scores="received").needs(shape_of("merging"))
    assert received == (ReceivedAttention(31), EncoderFeatures())
    for wrong in ({"alpha": -1}, {"combined": "max"}, {"scores": "text"}):
        (field,) = wrong
        with pytest.raises(MethodFieldError, match=f"{field}="):
            cls(**wrong)
