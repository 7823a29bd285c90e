"""SparseVLM: raters, scores and merged rows by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.decoder import at_cut, average
from kit.golden import Golden, Runner, assert_equal, choose
from kit.sparsevlm import V1, compared_raters, cut_layers, merged_of, some
from torch import Tensor
from vlmprune.prune.contract import Hidden, Method, Selection, TextAttention
from vlmprune.prune.methods.decoder import sparsevlm
from vlmprune.prune.methods.decoder.sparsevlm import raters
from vlmprune.prune.ops.clusters import merged_clusters
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import select


def _close(ours: Tensor, golden: Tensor) -> None:
    torch.testing.assert_close(ours, golden, rtol=1e-4, atol=1e-5)


def _count(kept: int, num_visual: int) -> int:
    """Rows of a stage that keeps so many tokens: the merged ones are counted as officially."""
    recycled = int(0.3 * (num_visual - kept)) + 1
    return kept + recycled // 10 + 1


def _entering(chosen: Selection, hidden: Tensor) -> Tensor:
    """The hidden states (K, D) of the rows, from those of all tokens (N, D)."""
    if chosen.order is None:
        return hidden[chosen.kept]
    rows = hidden[chosen.order]
    assert chosen.features is not None
    rows[chosen.rows] = chosen.features
    return rows


def _sparsevlm(golden: Golden, method: Method) -> None:
    arrays, start = golden.arrays, golden.params["image_start"]
    found = compared_raters(golden)
    assert method.positions == "repacked"
    sequence, certain = arrays["emb"], True
    for stage, layer in enumerate(cut_layers(golden, method)):
        # What the official noise may have changed, its own result replaces.
        attention = arrays[f"attn_{stage}"][:, found].mean((0, 1))
        num_visual = len(attention)
        keep = _count(min(golden.params["schedule"][stage], num_visual - 1), num_visual)
        prefix, visual, text = sequence.tensor_split([start, start + num_visual])
        signals = {TextAttention(layer - 1, rows=raters): attention, Hidden(layer): visual}
        chosen = choose(method, signals, keep, layer=layer)
        assert_equal(chosen.kept, arrays[f"kept_slots_{stage}"])
        sequence = torch.cat([prefix, _entering(chosen, visual), text])
        assert_equal(torch.arange(len(sequence)), arrays[f"pos_{stage}"])

        official = arrays.get(f"hidden_{stage}")
        if certain and official is not None:
            _close(sequence, official)
        certain = official is not None
        sequence = sequence if official is None else official


def _sparsevlm_merge(golden: Golden, method: Method) -> None:
    rows, pairs = merged_clusters(golden.arrays["x"], golden.params["cluster_num"])
    _close(rows, golden.arrays["merged"])
    assert_equal(pairs[1].sort().values, torch.arange(len(golden.arrays["x"])))


GOLDEN = {
    "sparsevlm": Runner("sparsevlm", lambda p: {"retain": p["retain"]}, _sparsevlm),
    "sparsevlm_merge": Runner("sparsevlm", lambda p: {}, _sparsevlm_merge),
}


def test_raters_look_more_than_the_mean():
    """Products 0, ln 3, 0 and their softmax 1/5, 3/5, 1/5; with the second token 1/3 each."""
    text = torch.tensor([[0.0, 1.0], [math.log(3), 0.0], [0.0, 2.0]])
    assert raters(torch.tensor([[1.0, 0.0]]), text).tolist() == [False, True, False]
    assert raters(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), text).tolist() == [False, True, False]
    # e^8, 1, e^16 of the third: it takes that token's look, the second the other's
    visual = torch.tensor([[4.0, 0.0], [0.0, 8.0]])
    assert raters(visual, text).tolist() == [False, True, True]


def test_the_softmax_is_over_text_and_has_no_scale():
    """Products 6, -2, -2 and 0, 0, 0: softmax .998 .002 and twice .119 .881, means .41 .59. With a
    scale of a tenth, that of this width: .65 .35 and twice .45 .55, means .515 .485."""
    visual, text = torch.zeros(3, 100), torch.zeros(2, 100)
    visual[:, 0], text[0, 0] = torch.tensor([6.0, -2.0, -2.0]), 1
    assert raters(visual, text).tolist() == [False, True]
    assert raters(visual / 10, text).tolist() == [True, False]


@pytest.mark.parametrize("text", [torch.randn(1, 4), torch.ones(5, 4), torch.zeros(2, 4)])
def test_if_none_looks_more_all_are_raters(text):
    visual = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert raters(visual, text).tolist() == [True] * len(text)


def test_raters_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    visual, text = (torch.randn(n, 8, generator=generator).half() for n in (50, 11))
    exact = (visual.double() @ text.double().T).softmax(1).mean(0)
    for at_once in (2**22, 77, 11, 1):
        monkeypatch.setattr(sparsevlm, "_AT_ONCE", at_once)
        assert torch.equal(raters(visual, text), exact > exact.mean())


def sparse_signals(scores, hidden, layer=3):
    return {TextAttention(layer - 1, rows=raters): scores, Hidden(layer): hidden}


def test_a_cut_by_hand():
    """Of 10 tokens 6 rows: 5 kept, and of the 5 others the best two (int(1.5) + 1) merged to 1."""
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5, 0.0])
    hidden = torch.arange(20.0).view(10, 2) + 1
    tokens = at_cut(sparse_signals(scores, hidden), layer=3)
    chosen = method_class(V1)().select(tokens, 6)
    assert chosen.kept.tolist() == [1, 3, 5, 7, 8]
    assert chosen.order.tolist() == [1, 3, 5, 7, 8, -1]
    assert chosen.rows.tolist() == [5] and chosen.projected
    assert chosen.groups.tolist() == [[5, 5], [6, 4]]  # by score
    torch.testing.assert_close(chosen.features, (hidden[4] + hidden[6])[None] / (2 + 1e-6))


def test_a_single_row_is_the_best_token():
    signals = some(V1, 20)
    chosen = method_class(V1)().select(at_cut(signals, layer=3), 1)
    assert chosen.kept.tolist() == [int(signals[TextAttention(2, rows=raters)].argmax())]
    assert chosen.order is None and chosen.features is None and chosen.groups is None


@given(num_tokens=st.integers(2, 400), seed=st.integers(0, 9), data=st.data())
@settings(deadline=None, max_examples=60)
def test_rows_and_members(num_tokens, seed, data):
    """Exactly as many rows as asked; of what goes, the best three tenths are merged, each once."""
    keep = data.draw(st.integers(1, num_tokens - 1))
    signals = some(V1, num_tokens, seed=seed)
    scores, hidden = signals.values()
    chosen = select(method_class(V1)(), at_cut(signals, layer=3), keep)
    assert chosen.count == keep
    best, merged = len(chosen.kept), keep - len(chosen.kept)
    ranked = scores.argsort(descending=True, stable=True)
    assert chosen.kept.tolist() == ranked[:best].sort().values.tolist()
    if not merged:
        assert keep == 1
        return
    assert chosen.order.tolist() == [*chosen.kept.tolist(), *[-1] * merged]
    assert chosen.rows.tolist() == list(range(best, keep))
    row, member = chosen.groups
    recycled = ranked[best : best + int(0.3 * (num_tokens - best)) + 1]
    assert member.sort().values.tolist() == recycled.sort().values.tolist()
    assert set(row.tolist()) == set(range(best, keep)) and row.tolist() == sorted(row.tolist())
    for number, feature in zip(range(best, keep), chosen.features, strict=True):
        mine = hidden[member[row == number]]
        torch.testing.assert_close(feature, mine.sum(0) / (len(mine) + 1e-6))


@pytest.mark.parametrize("num_tokens", [*range(2, 61), 117, 204, 309, 576, 577, 2880])
def test_every_count_is_met(num_tokens):
    """Kept and merged make the count as officially wherever that is possible, else one is kept."""
    possible = {}
    for kept in range(1, num_tokens):
        possible[kept + merged_of(num_tokens - kept)] = kept  # the largest of two
    for keep in range(1, num_tokens):
        assert sparsevlm._kept_of(num_tokens, keep) == possible.get(keep, 1)
    least = min(possible)
    assert sorted(possible) == list(range(least, num_tokens + 1))


def test_a_cut_reads_its_own_layer():
    signals = some(V1, 30, layer=3) | some(V1, 30, layer=7, seed=1)
    for layer in (3, 7):
        alone = {s: v for s, v in signals.items() if s in method_class(V1)().reads(layer)}
        one, two = (
            method_class(V1)().select(at_cut(given, layer=layer), 9) for given in (signals, alone)
        )
        assert torch.equal(one.kept, two.kept) and torch.equal(one.features, two.features)


def test_merged_rows_have_the_dtype_of_the_model():
    signals = some(V1, 40)
    signals[Hidden(3)] = signals[Hidden(3)].bfloat16()
    assert method_class(V1)().select(at_cut(signals, layer=3), 20).features.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("retain", "behind", "entering"),
    [(192, 192.0, 206.5), (128, 128.6, 145.4), (96, 96.9, None), (64, 64.8, 82.3)],
)
def test_published_averages(retain, behind, entering):
    call = method(V1, retain=retain)
    assert round(average(call, shift=1), 1) == behind
    assert entering is None or average(call) == pytest.approx(entering, abs=0.0501)
