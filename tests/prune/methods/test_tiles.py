"""What methods that weigh tiles and chunks hold: exact counts, towers, precision, fields."""

import math
from dataclasses import replace

import pytest
import torch
from kit.tiles import counts, make_tokens, shape_of
from kit.tilings import TILINGS, TOWERS
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.contract import ReceivedAttention
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import select

CALLS = [
    ("cls_topk", {}),
    ("cls_topk", {"scope": "image", "scores": "received"}),
    ("vtc_cls", {}),
    ("vtc_cls", {"scores": "received"}),
    ("fopru", {}),
    ("fopru", {"axis": "auto"}),
    ("fopru", {"axis": "given", "strategy": "row"}),
    ("fopru", {"strategy": "row", "scope": "image"}),
    ("hired", {}),
    ("hired", {"alpha": 0.0}),
    ("hired", {"alpha": 1.0}),
    ("hired", {"scores": "received", "alpha": 0.3}),
    ("globalcom2", {}),
    ("globalcom2", {"newlines": "drop", "temperature": 0.1}),
    ("globalcom2", {"scores": "received"}),
    ("holov", {}),
    ("holov", {"num_chunks": 3, "alpha": 5.0}),
    ("holov", {"num_chunks": 1000}),
    ("holov", {"scope": "tile", "scores": "received"}),
]
IDS = [f"{name}-{'-'.join(map(str, fields.values()))}" for name, fields in CALLS]


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_every_count_is_exact(name, fields, tiling):
    method = method_class(name)(**fields)
    for constant in (False, True):
        tokens = make_tokens(method, tiling, constant=constant)
        for keep in counts(method, tiling):
            chosen = select(method, tokens, keep)
            kept = chosen.kept.tolist()
            assert kept == sorted(set(kept)) and len(kept) == keep
            assert kept[0] >= 0 and kept[-1] < tiling.num_tokens
            assert chosen.order is None or sorted(chosen.order.tolist()) == kept


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_runs_on_every_tower_that_has_its_signals(name, fields, tower):
    method, shape = method_class(name)(**fields), shape_of(tower)
    needs = method.needs(shape)
    assert len(set(needs)) == len(needs)
    for signal in needs:
        layer = getattr(signal, "layer", 0)
        assert 0 <= layer < shape.tower.num_layers
        assert (
            not isinstance(signal, ReceivedAttention)
            or shape.tower.full_attention is None
            or (layer in shape.tower.full_attention)
        )
    reads_cls = fields.get("axis") == "given" or (
        name != "fopru" and fields.get("scores") != "received"
    )
    assert any(map(shape.lacks, needs)) == (reads_cls and not shape.tower.has_cls)
    tokens = make_tokens(method, TILINGS["without padding"], tower=tower)
    assert select(method, tokens, 20).count == 20


@pytest.mark.parametrize("tiling", ["plain", "2 x 2 with newlines", "without padding"])
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_inputs_stay_and_results_repeat(name, fields, tiling):
    method = method_class(name)(**fields)
    for constant in (False, True):
        tokens = make_tokens(method, TILINGS[tiling], constant=constant)
        before = {signal: tensor.clone() for signal, tensor in tokens.signals.items()}
        first, second = select(method, tokens, 14), select(method, tokens, 14)
        for signal, tensor in tokens.signals.items():
            assert tensor._version == 0
            assert torch.equal(tensor, before[signal])
        assert torch.equal(first.kept, second.kept)
        assert (first.order is None) == (second.order is None)
        assert first.order is None or torch.equal(first.order, second.order)


@pytest.mark.parametrize("tiling", ["plain", "2 x 2", "without padding", "video"])
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_nothing_waits_for_the_device(name, fields, tiling):
    """Fake tensors have no values: whatever asked for one would raise."""
    method = method_class(name)(**fields)
    tokens = make_tokens(method, TILINGS[tiling].without_newlines())
    keep = 6
    select(method, tokens, keep)  # fills the caches with real tensors
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        signals = {signal: mode.from_tensor(t) for signal, t in tokens.signals.items()}
        assert select(method, replace(tokens, signals=signals), keep).count == keep


@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_scores_are_float32(name, fields):
    """bfloat16 signals choose what the same numbers in float32 choose."""
    method = method_class(name)(**fields)
    tokens = make_tokens(method, TILINGS["without padding"])
    low = {signal: tensor.bfloat16() for signal, tensor in tokens.signals.items()}
    high = {signal: tensor.float() for signal, tensor in low.items()}
    kept = [select(method, replace(tokens, signals=s), 17).kept for s in (low, high)]
    assert torch.equal(*kept)


def test_scopes_and_newlines_of_the_papers():
    classes = {name: method_class(name) for name, _ in CALLS}
    assert {name: (c().scope_used, c().newline_policy) for name, c in classes.items()} == {
        "cls_topk": ("tile", "drop"),
        "vtc_cls": ("tile", "drop"),
        "fopru": ("tile", "drop"),
        "hired": ("image", "drop"),
        "globalcom2": ("image", "keep"),
        "holov": ("image", "drop"),
    }


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *[(name, "scores", "mean") for name in ("cls_topk", "vtc_cls", "hired", "globalcom2")],
        *[(name, "layer", 2.0) for name in ("cls_topk", "fopru", "hired", "globalcom2", "holov")],
        ("fopru", "strategy", "column"),
        ("fopru", "axis", None),
        ("hired", "alpha", 1.1),
        ("hired", "budget_layer", "first"),
        ("globalcom2", "temperature", 0),
        ("globalcom2", "temperature", math.nan),
        ("globalcom2", "temperature", True),
        ("holov", "num_chunks", 0),
        ("holov", "num_chunks", 2.0),
        ("holov", "alpha", -1),
        ("holov", "alpha", math.inf),
        ("holov", "scores", None),
        ("hired", "scope", "tile"),
        ("globalcom2", "scope", "tile"),
        ("globalcom2", "newlines", "compete"),
    ],
)
def test_a_wrong_field_is_refused(name, field, value):
    with pytest.raises(MethodFieldError, match=f"{field}=") as caught:
        method_class(name)(**{field: value})
    assert "give " in str(caught.value) or "use " in str(caught.value)
