"""CoreMatching: overlaps of neurons, the elbow, its cut."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.decoder import DEPTHS, at_cut, layers_of, model, stages
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from kit.greedy import rand
from torch import Tensor
from vlmprune.prune.budget import plan
from vlmprune.prune.contract import ModelShape, Neurons, Signal
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.methods.decoder import corematching
from vlmprune.prune.methods.decoder.corematching import CoreMatching, Overlap
from vlmprune.prune.ops.elbow import elbow
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import most, select
from vlmprune.prune.tiling import Tiling


@dataclass(frozen=True, kw_only=True)
class OfficialCoreMatching(CoreMatching):
    """All active neurons of a token, compared with those of the fifth text token from the end."""

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (Neurons(self._layer(shape), shared_with_question),)


def shared_with_question(visual: Tensor, text: Tensor) -> Tensor:
    asked = text[max(-5, -len(text))] > 0
    return (visual > 0).float() @ asked.float()


def _corematching(golden: Golden, method: Any) -> None:
    activations, params = golden.arrays["act"], golden.params
    visual = slice(params["image_start"], params["image_start"] + params["n_image"])
    (neurons,) = method.needs(CLIP_L)
    assert isinstance(neurons, Neurons)
    overlap = neurons.read(activations[visual], activations[visual.stop :])
    assert_equal(overlap, golden.arrays["overlap"])
    kept = choose(method, {neurons: overlap}, None, layer=neurons.layer + 1).kept
    assert_equal(kept, golden.arrays["kept"])


GOLDEN = {
    "corematching": Runner(
        "corematching", lambda p: {"reference": "question"}, _corematching, OfficialCoreMatching
    ),
}
SENTENCE = Overlap(0.5, 0.5, "sentence")
QUESTION = Overlap(0.5, 0.5, "question")
OFFICIAL = shared_with_question


def overlaps_token_by_token(visual: Tensor, text: Tensor, rho: float, beta: float) -> list[int]:
    """The paper's rule on sets of neurons."""
    core = []
    for row in [*visual.tolist(), *text.tolist()]:
        positive = sorted(a for a in row if a > 0)
        least = positive[math.ceil(rho * (len(positive) - 1))] if positive else math.inf
        core.append({i for i, a in enumerate(row) if a >= least})
    width = visual.shape[1]
    frequency = [sum(i in of for of in core) for i in range(width)]
    ranked = sorted(range(width), key=lambda i: (-frequency[i], i))
    sentence = set(ranked[: max(1, round(beta * width))])
    return [len(of & sentence) for of in core[: len(visual)]]


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(1, 1, 5), (7, 3, 12), (64, 1, 20), (150, 70, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_overlaps_are_the_plain_ones(rho, sizes, dtype):
    """Whatever the number of tokens compared at once."""
    num_tokens, words, width = sizes
    visual, text = rand(1, num_tokens, width).to(dtype), rand(2, words, width).to(dtype)
    visual[0] = -1  # a token without any active neuron
    for beta in (0.0, 0.4, 1.0):
        read = Overlap(rho, beta, "sentence")(visual, text)
        assert read.dtype == torch.float32
        expected = overlaps_token_by_token(visual.float(), text.float(), rho, beta)
        assert read.tolist() == expected


def test_overlap_by_hand():
    """Core neurons are the larger half of the positive ones, the middle one among them.

    Token 0: 1 and 2 (of 0, 1, 2). Token 1: 3. Token 2: 1. Word: 0 and 1 (0 is the middle).
    Counts are 1, 3, 1, 1, so the sentence has neurons 1 and, of equal ones, 0.
    """
    visual = torch.tensor([[0.1, 0.5, 0.3, -1], [-1, -1, 0, 2], [-9, 0.1, -1, -1]])
    text = torch.tensor([[0.2, 0.4, 0.1, 0]])
    assert SENTENCE(visual, text).tolist() == [1, 0, 1]
    # all active ones: {0, 1, 2}, {3}, {1} with {0, 1, 2} of the word
    assert OFFICIAL(visual, text).tolist() == [3, 0, 1]
    # core neurons with all active ones of the word
    assert QUESTION(visual, text).tolist() == [2, 0, 1]


@pytest.mark.parametrize("words", [1, 2, 4, 5, 6, 20])
def test_which_question_token(words):
    """The last one; as released, the fifth from the end, or the first of fewer."""
    text = -torch.ones(words, 4)
    text[-1, :3] = 1
    visual = torch.ones(2, 4)
    assert QUESTION(visual, text).tolist() == [3, 3]
    text = -torch.ones(words, 4)
    text[max(0, words - 5), :2] = 1
    assert OFFICIAL(visual, text).tolist() == [2, 2]


def test_rho_and_beta_count():
    visual, text = rand(3, 40, 30), rand(4, 5, 30)
    reads = [Overlap(rho, beta, "sentence") for rho in (0, 0.6) for beta in (0.2, 0.7)]
    sums = [int(read(visual, text).sum()) for read in reads]
    assert sums[0] < sums[1] and sums[2] < sums[3]
    assert sums[0] > sums[2] and sums[1] > sums[3]


def test_reading_changes_nothing_and_takes_few_rows(monkeypatch):
    visual, text = rand(5, 70, 16), rand(6, 9, 16)
    for read in (SENTENCE, QUESTION, OFFICIAL):
        before = read(visual, text)
        assert visual._version == text._version == 0
        with monkeypatch.context() as patched:
            patched.setattr(corematching, "_ROWS", 7)
            assert torch.equal(read(visual, text), before)


def test_equal_declarations_are_equal():
    one, two = (method_class("corematching")(rho=0.3).needs(model()) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    others = [{}, {"rho": 0.3, "beta": 0.5}, {"rho": 0.3, "reference": "question"}]
    for fields in others:
        assert method_class("corematching")(**fields).needs(model()) != one


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # From (0, 10) to (4, 1); times 4 the distances are 0, 5, 10, 5, 0.
        ([10, 9, 3, 2, 1], 3),
        ([2, 10, 1, 3, 9], 3),  # in any order
        # From (0, 10) to (3, 1): 0, 6, 12, 0; above the chord counts as well.
        ([10, 9, 8, 1], 8),
        # From (0, 8) to (4, 0): 0, 4, 0, 4, 0; the first of equals, below or above.
        ([8, 5, 4, 3, 0], 5),
        ([5, 4, 3, 2], 5),  # all on the chord
        ([4, 4, 4], 4),
        ([7], 7),
    ],
)
def test_elbow_by_hand(values, expected):
    assert elbow(torch.tensor(values, dtype=torch.float32)).tolist() == [expected]


def chosen_of(overlaps: list[float], keep: int | None = None, **fields) -> list[int]:
    core = method_class("corematching")(**fields)
    (neurons,) = core.needs(model())
    tokens = at_cut({neurons: torch.tensor(overlaps).float()}, layer=neurons.layer + 1)
    return select(core, tokens, keep).kept.tolist()


def test_core_tokens_lie_above_the_elbow():
    assert chosen_of([2, 10, 1, 3, 9]) == [1, 4]
    assert chosen_of([2, 10, 1, 3, 3, 9, 3]) == [1, 5]  # its equals are out
    assert chosen_of([1, 9, 8, 10]) == [1, 3]


def test_a_token_stays_where_none_stands_out():
    assert chosen_of([4, 4, 4]) == [0]
    assert chosen_of([3, 5, 5, 4]) == [1]  # the elbow is the second of the largest
    assert chosen_of([2, 3, 4, 5]) == [3]  # all on the chord, whose first point is the elbow
    assert chosen_of([7]) == [0]


def test_a_budget_keeps_the_largest_overlaps():
    overlaps = [2, 5, 5, 1, 5, 3]
    picked = [chosen_of(overlaps, keep) for keep in range(1, 6)]
    assert picked == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 5], [0, 1, 2, 4, 5]]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
def test_core_tokens_are_some_and_at_most_the_declared(overlaps):
    kept = chosen_of(overlaps)
    core = method_class("corematching")()
    assert 1 <= len(kept) <= most(core, Tiling.single(1, len(overlaps)))
    worst, others = min(overlaps[i] for i in kept), set(range(len(overlaps))) - {*kept}
    if len(kept) > 1:
        assert all(overlaps[i] < worst for i in others)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 30])
def test_the_declared_most_can_be_reached(num_tokens):
    falling = [*range(100, 101 - num_tokens, -1), 0]
    assert len(chosen_of(falling)) == method_class("corematching")().most(num_tokens)


@pytest.mark.parametrize("depth", DEPTHS)
def test_corematching_reads_the_layer_before_its_cut(depth):
    core = method_class("corematching")()
    (cut,), (neurons,) = core.cuts(model(depth)), core.needs(model(depth))
    assert isinstance(neurons, Neurons) and cut.layer == neurons.layer + 1
    published = {32: 5, 28: 4, 40: 6, 4: 1, 6: 1, 80: 12}
    assert neurons.layer == published.get(depth, neurons.layer)
    assert 1 <= cut.layer < depth


def test_corematching_takes_a_layer():
    assert layers_of("corematching", 32, layer=0) == [1]
    assert layers_of("corematching", 6, layer=-2) == [5]
    for layer in (31, -1):
        with pytest.raises(MethodFieldError, match=r"last layer.*0\.\.30"):
            layers_of("corematching", 32, layer=layer)
    with pytest.raises(MethodFieldError, match="has 6"):
        layers_of("corematching", 6, layer=9)


@pytest.mark.parametrize("depth", [4, 6, 32])
def test_corematching_is_planned(depth):
    (cut,) = layers_of("corematching", depth)
    (stage,) = plan(100, [method("corematching")], model(depth))
    assert (stage.layer, stage.keep, stage.adaptive) == (cut, 100, True)
    assert stages(method("corematching", keep_ratio=0.3), 100, depth) == [(cut, 30)]
    (stage,) = plan(100, [method("corematching", keep_tokens=7)], model(depth))
    assert not stage.adaptive
    assert stages(method("corematching", keep_ratio=1.0), 100, depth) == []
