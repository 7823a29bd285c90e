"""What every method that shortens the KV cache holds: exact counts, ties, precision, fields."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.entries import COMPRESSING, VisualPress, entries_of, made
from kit.golden import CLIP_L
from vlmprune.prune.contract import CacheEntries, ReceivedInLayer
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.methods.cache.elastic_cache import ElasticCache
from vlmprune.prune.methods.cache.token_select import TokenSelect
from vlmprune.prune.registry import method, method_class


def tensors(entries: CacheEntries) -> list[torch.Tensor]:
    return [
        entries.keys,
        entries.values,
        entries.queries,
        entries.visual,
        entries.hidden,
        *entries.rotary,
        *entries.signals.values(),
    ]


IDS = [f"{name}-{'-'.join(map(str, fields.values()))}" for name, fields in COMPRESSING]


@pytest.mark.parametrize(("name", "fields"), COMPRESSING, ids=IDS)
@given(st.text("vt", min_size=2, max_size=24), st.integers(0, 5), st.data())
def test_every_count_is_exact(name, fields, visual, seed, data):
    entries = made(visual, seed=seed)
    least = visual.count("t") + 1 if name == "visual_press" else 1
    if least >= len(visual):
        return
    keep = data.draw(st.integers(least, len(visual) - 1))
    done = method_class(name)(**fields).compress(entries, keep)
    rows = done.kept if done.kept.ndim == 2 else done.kept[None]
    assert done.kept.dtype == torch.int64
    for row in rows.tolist():
        assert row == sorted(set(row)) and len(row) == keep
        assert row[0] >= 0 and row[-1] < len(visual)
    for tensor in (done.keys, done.values):
        assert tensor is None or tensor.shape == (2, keep, 4)
    if name == "visual_press":
        text = {i for i, letter in enumerate(visual) if letter == "t"}
        assert done.kept.shape == (2, keep)
        assert all(text <= set(row) for row in rows.tolist())


@pytest.mark.parametrize(("name", "fields"), COMPRESSING, ids=IDS)
def test_inputs_stay_and_results_repeat(name, fields):
    entries = made("tvvvvvvvvvtt")
    before = [tensor.clone() for tensor in tensors(entries)]
    first, second = (method_class(name)(**fields).compress(entries, 7) for _ in range(2))
    for tensor, was in zip(tensors(entries), before, strict=True):
        assert tensor._version == 0
        assert torch.equal(tensor, was)
    assert torch.equal(first.kept, second.kept)
    assert first.keys is None or torch.equal(first.keys, second.keys)


@pytest.mark.parametrize(("name", "fields"), COMPRESSING, ids=IDS)
def test_ties_go_to_the_lower_index(name, fields):
    keys = torch.ones(2, 9, 4)
    visual = torch.tensor([False] + [True] * 7 + [False])
    entries = entries_of(keys, keys, received=torch.ones(9), visual=visual)
    fields = {**fields, "kernel": 1} if name == "visual_press" else fields
    for keep in range(3, 9):
        kept = method_class(name)(**fields).compress(entries, keep).kept
        assert kept.view(-1, keep)[-1].tolist() == [*range(keep - 1), 8]


@pytest.mark.parametrize(("name", "fields"), COMPRESSING, ids=IDS)
def test_scores_are_float32(name, fields):
    """bfloat16 entries keep what the same numbers in float32 keep, and stay bfloat16."""
    exact = made("tvvvvvvvvvvvvvvvvvtt", width=8)
    low = entries_of(
        exact.keys.bfloat16(),
        exact.values.bfloat16(),
        queries=exact.queries.bfloat16(),
        visual=exact.visual,
        received=exact.signals[ReceivedInLayer(0)],
    )
    high = entries_of(
        low.keys.float(),
        low.values.float(),
        queries=low.queries.float(),
        visual=exact.visual,
        received=exact.signals[ReceivedInLayer(0)],
    )
    ours, wanted = (method_class(name)(**fields).compress(e, 11) for e in (low, high))
    assert torch.equal(ours.kept, wanted.kept)
    if ours.keys is not None:
        assert ours.keys.dtype == torch.bfloat16
        assert torch.equal(ours.keys, wanted.keys.bfloat16())


@pytest.mark.parametrize("name", ["elastic_cache", "visual_press"])
def test_reads_the_layer_that_it_is_given(name):
    fields = {"press": "received"} if name == "visual_press" else {}
    call = method_class(name)(**fields)
    assert call.needs(CLIP_L) == tuple(ReceivedInLayer(layer) for layer in range(32))
    keys = torch.ones(1, 6, 2)
    rising = torch.arange(6.0)
    signals = {ReceivedInLayer(3): rising, ReceivedInLayer(17): -rising}
    for layer, best in ((3, 4), (17, 1)):
        entries = replace(entries_of(keys, keys, layer=layer), signals=signals)
        assert best in call.compress(entries, 3).kept.flatten().tolist()


def test_positions():
    assert VisualPress.positions == "original"
    assert ElasticCache.positions == TokenSelect.positions == "repacked"


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("elastic_cache", "start_size", -1),
        ("elastic_cache", "start_size", True),
        ("elastic_cache", "distance", 1.5),
        ("token_select", "n_init", -1),
        ("token_select", "n_local", 0),
        ("token_select", "top_k", 0),
        ("token_select", "pool", 2),
        ("token_select", "pool", 0),
        ("visual_press", "window", 0),
        ("visual_press", "kernel", 4),
        ("visual_press", "kernel", 0),
        ("visual_press", "pooling", "mean"),
        ("visual_press", "press", None),
    ],
)
def test_impossible_fields(name, field, value):
    with pytest.raises(MethodFieldError, match=f"{field}="):
        method_class(name)(**{field: value})


@pytest.mark.parametrize("name", ["elastic_cache", "visual_press"])
def test_a_budget_is_needed(name):
    with pytest.raises(BudgetError, match=f"{name} needs a budget"):
        method(name)
    assert method(name, keep_ratio=0.5).budget is not None
