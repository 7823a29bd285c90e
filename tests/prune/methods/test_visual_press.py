"""VisualPress: presses by hand, against a slow reading, and as kvpress asks them."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.entries import VisualPress, entries_of, made
from kit.golden import CLIP_L
from vlmprune.prune.contract import CacheEntries
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.presses import observed


class Attention(torch.nn.Module):
    """A layer's attention module with its own scale."""

    def __init__(self, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling


class FirstValues:
    """As kvpress's ScorerPress: higher scores stay."""

    def __init__(self, shape=None) -> None:
        self.calls, self.shape = [], shape

    def __eq__(self, other: object) -> bool:  # as a dataclass: by value, so without a hash
        return type(self) is type(other)

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        self.calls.append((module, hidden_states, keys, values, attentions, kwargs))
        return values[..., 0] if self.shape is None else torch.zeros(self.shape)


def kept_by(press, entries: CacheEntries, keep: int, **fields) -> list[list[int]]:
    return VisualPress(press=press, **fields).compress(entries, keep).kept.tolist()


def test_small_keys_stay_in_each_head():
    lengths = torch.tensor([[9.0, 1, 3, 2, 9, 9], [0, 4, 2, 3, 0, 9]])
    keys = torch.stack([lengths, torch.zeros(2, 6)], -1)
    visual = torch.tensor([False, True, True, True, True, False])
    entries = entries_of(keys, keys, visual=visual)
    assert kept_by("knorm", entries, 4) == [[0, 1, 3, 5], [0, 2, 4, 5]]
    assert kept_by("knorm", entries, 3) == [[0, 1, 5], [0, 4, 5]]


def test_received_attention_is_the_same_for_all_heads():
    visual = torch.tensor([False, True, True, True, False])
    keys = torch.ones(2, 5, 2)
    entries = entries_of(
        keys, keys, visual=visual, received=torch.tensor([3.0, 0.1, 0.3, 0.2, 0.0])
    )
    assert kept_by("received", entries, 4) == [[0, 2, 3, 4]] * 2


def test_text_between_and_scores_without_limits():
    """Text stays where an infinite score stands against it, or a score that is none."""
    for junk in (math.inf, -math.inf, math.nan):
        values = torch.tensor([0.0, junk, 0, 3, junk, 5, 0])[None, :, None]
        visual = torch.tensor([True, True, False, True, True, True, False])
        entries = entries_of(values, values, visual=visual)
        (row,) = kept_by(FirstValues(), entries, 4)
        assert len(set(row)) == 4 and {2, 6} <= set(row)


def slow_observed(entries: CacheEntries, window: int, kernel: int, pooling: str) -> torch.Tensor:
    heads, length, width = entries.keys.shape
    group = len(entries.queries) // heads
    last_visual = max(i for i in range(length) if entries.visual[i])
    rows = [r for r in range(max(0, length - window), length) if r > last_visual] or [length - 1]
    scale = getattr(entries.attention, "scaling", 1 / math.sqrt(width))
    scores = torch.zeros(heads, length)
    for h, q in enumerate(entries.queries):
        for r in rows:
            seen = entries.keys[h // group, : r + 1]
            scores[h // group, : r + 1] += (seen @ q[r] * scale).softmax(0) / len(rows) / group
    scores[:, ~entries.visual] = 0
    side = kernel // 2
    padded = torch.nn.functional.pad(scores, (side, side))
    windows = torch.stack([padded[:, i : i + length] for i in range(kernel)])
    return windows.mean(0) if pooling == "avg" else windows.amax(0)


@given(
    st.text("vvt", min_size=2, max_size=20).filter(lambda s: "v" in s),
    st.integers(1, 25),
    st.sampled_from([1, 3, 5]),
    st.sampled_from(["avg", "max"]),
    st.sampled_from([None, Attention(2.0)]),
)
def test_snapkv_follows_its_rule(visual, window, kernel, pooling, attention):
    base = made(visual)
    entries = entries_of(
        base.keys, base.values, queries=base.queries, visual=base.visual, attention=attention
    )
    ours = observed(entries, window, kernel, pooling)
    torch.testing.assert_close(ours, slow_observed(entries, window, kernel, pooling))


def test_snapkv_by_hand():
    """The last row looks at 3, the row before it at 1, and the visual row at 2 does not count.

    With pooling the neighbours of 3 and of 1 share their attention: 2 has both.
    """
    one = torch.eye(6) * 20
    queries = torch.stack([one[0], one[0], one[0], one[2], one[1], one[3]])[None]
    visual = torch.tensor([False, True, True, True, False, False])
    entries = entries_of(torch.eye(6)[None], torch.eye(6)[None], queries=queries, visual=visual)
    fields = {"pooling": "max", "kernel": 1}
    assert kept_by("snapkv", entries, 5, **fields) == [[0, 1, 3, 4, 5]]
    assert kept_by("snapkv", entries, 4, window=1, **fields) == [[0, 3, 4, 5]]
    assert kept_by("snapkv", entries, 4, pooling="avg", kernel=3) == [[0, 2, 4, 5]]


def test_snapkv_takes_the_mean_of_heads_with_the_same_keys():
    """Head 0 prefers 1 by little, head 1 prefers 2 by much."""
    keys = torch.zeros(1, 4, 2)
    keys[0, 1, 0], keys[0, 2, 1] = 1, 1
    queries = torch.zeros(2, 4, 2)
    queries[0, 3], queries[1, 3] = torch.tensor([1.0, 0]), torch.tensor([0.0, 5])
    visual = torch.tensor([False, True, True, False])
    for order, best in ((queries, 2), (queries.flip(0), 2), (queries[:1], 1)):
        entries = entries_of(keys, keys, queries=order, visual=visual)
        assert kept_by("snapkv", entries, 3, kernel=1) == [[0, best, 3]]


def test_a_press_of_kvpress_is_asked_as_there():
    entries = made("tvvvtvt", heads=3)
    press = FirstValues()
    (kept,) = {tuple(map(tuple, kept_by(press, entries, 5))) for _ in range(2)}
    module, hidden, keys, values, attentions, kwargs = press.calls[0]
    assert module is entries.attention and attentions is None
    assert torch.equal(hidden, entries.hidden[None])
    assert torch.equal(keys, entries.keys[None]) and torch.equal(values, entries.values[None])
    cos, sin = kwargs["position_embeddings"]
    assert torch.equal(cos, entries.rotary[0][None]) and torch.equal(sin, entries.rotary[1][None])
    for head, row in enumerate(kept):
        best = sorted((1, 2, 3, 5), key=lambda i: -entries.values[head, i, 0])[:2]
        assert list(row) == sorted([0, 4, 6, *best])


def test_an_object_is_named_in_result_files():
    call = VisualPress(press=FirstValues())
    assert json.loads(json.dumps(call.fields()))["press"] == "FirstValues"
    assert VisualPress().fields() == {
        "press": "snapkv",
        "window": 32,
        "kernel": 5,
        "pooling": "avg",
    }
    assert hash(call) == hash(VisualPress(press=FirstValues()))
    assert call == VisualPress(press=FirstValues()) != VisualPress()
    assert call.needs(CLIP_L) == VisualPress().needs(CLIP_L) == ()


def test_text_needs_room():
    entries = made("tvvvtvt")
    for keep in (1, 3):
        with pytest.raises(BudgetError, match=rf"all 3 text .* of {keep} .* least .* is 4"):
            VisualPress().compress(entries, keep)
    assert VisualPress().compress(entries, 4).kept.shape == (2, 4)


@pytest.mark.parametrize("shape", [(2, 7), (1, 7, 2), (1, 2, 6)])
def test_scores_of_another_shape_are_refused(shape):
    with pytest.raises(MethodFieldError, match=r"FirstValues returned shape .*\(1, 2, 7\)"):
        VisualPress(press=FirstValues(shape)).compress(made("tvvvtvt"), 5)


def test_press_must_score():
    with pytest.raises(MethodFieldError, match="Did you mean: snapkv"):
        VisualPress(press="snapvk")
    with pytest.raises(MethodFieldError, match="does not score: use snapkv, knorm, received"):
        VisualPress(press=3)
    with pytest.raises(MethodFieldError, match="not its class"):
        VisualPress(press=FirstValues)
