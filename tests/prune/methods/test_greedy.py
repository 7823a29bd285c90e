"""What methods that pick greedily hold: exact counts, ties, no waiting, fields, layers."""

import math
from dataclasses import replace

import pytest
import torch
from kit.greedy import TILINGS, make_tokens, shape_of
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.contract import PixelSeed, ReceivedAttention
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.ops import facility
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Tiling

CALLS = [
    ("vispruner", {}),
    ("vispruner", {"important": 0.0}),
    ("vispruner", {"important": 1.0, "scores": "received"}),
    ("vispruner", {"important": 0.3, "newlines": "keep"}),
    ("cdpruner", {}),
    ("cdpruner", {"newlines": "keep"}),
    ("todre", {}),
    ("todre", {"rule": "k_center", "pivot": "received"}),
    ("todre", {"pivot": "random", "newlines": "keep"}),
    ("catp", {}),
    ("catp", {"scope": "tile", "alignment": 3}),
]
IDS = [f"{name}-{'-'.join(map(str, fields.values()))}" for name, fields in CALLS]


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_every_count_is_exact(name, fields, tiling):
    method = method_class(name)(**fields)
    least = tiling.num_newlines + 1 if method.newline_policy == "keep" else 1
    step = 1 if tiling.num_tokens < 30 else 11
    counts = {*range(least, tiling.num_tokens, step), tiling.num_tokens - 1}
    for constant in (False, True):
        tokens = make_tokens(method, tiling, constant=constant)
        for keep in sorted(counts):
            chosen = select(method, tokens, keep)
            kept = chosen.kept.tolist()
            assert kept == sorted(set(kept)) and len(kept) == keep
            assert kept[0] >= 0 and kept[-1] < tiling.num_tokens
            assert chosen.order is None and chosen.features is None


@pytest.mark.parametrize("tiling", ["plain", "2 x 2 with newlines", "without padding"])
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_inputs_stay_and_results_repeat(name, fields, tiling):
    method = method_class(name)(**fields)
    for constant in (False, True):
        tokens = make_tokens(method, TILINGS[tiling], constant=constant)
        before = {signal: tensor.clone() for signal, tensor in tokens.signals.items()}
        first, second = (select(method, tokens, 14).kept for _ in range(2))
        for signal, tensor in tokens.signals.items():
            assert tensor._version == 0
            assert torch.equal(tensor, before[signal])
        assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "fields"), [c for c in CALLS if c[0] != "vispruner"])
def test_ties_go_to_the_lower_index(name, fields):
    method = method_class(name)(**fields)
    tokens = make_tokens(method, Tiling.single(5, 6), constant=True)
    if fields.get("pivot") == "random":
        tokens = replace(tokens, signals={**tokens.signals, PixelSeed(): torch.tensor(30)})
    for keep in (1, 2, 13, 29):
        assert select(method, tokens, keep).kept.tolist() == list(range(keep))


@pytest.mark.parametrize("tiling", ["plain", "2 x 2", "without padding", "video"])
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_nothing_waits_for_the_device(name, fields, tiling, monkeypatch):
    """Fake tensors have no values: whatever asked for one would raise.

    On the CPU, catp asks how many rows changed; here it runs as on an accelerator.
    """
    monkeypatch.setattr(facility, "_reads_all", lambda unit: True)
    method = method_class(name)(**fields)
    tokens = make_tokens(method, TILINGS[tiling].without_newlines())
    select(method, tokens, 6)  # fills the caches with real tensors
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        signals = {signal: mode.from_tensor(t) for signal, t in tokens.signals.items()}
        assert select(method, replace(tokens, signals=signals), 6).count == 6


@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_scores_are_float32(name, fields):
    """bfloat16 signals choose what the same numbers in float32 choose."""
    method = method_class(name)(**fields)
    tokens = make_tokens(method, TILINGS["without padding"])
    low = {s: t.bfloat16() if t.is_floating_point() else t for s, t in tokens.signals.items()}
    high = {s: t.float() if t.is_floating_point() else t for s, t in low.items()}
    kept = [select(method, replace(tokens, signals=s), 17).kept for s in (low, high)]
    assert torch.equal(*kept)


@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_survives_tokens_of_zeros(name, fields):
    method = method_class(name)(**fields)
    tokens = make_tokens(method, TILINGS["plain"])
    signals = {}
    for signal, tensor in tokens.signals.items():
        signals[signal] = tensor.clone()
        if tensor.ndim == 2:
            signals[signal][:2] = 0
    for keep in range(1, 15):
        assert select(method, replace(tokens, signals=signals), keep).count == keep


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("vispruner", "important", -0.1),
        ("vispruner", "important", math.nan),
        ("vispruner", "layer", 1.5),
        ("vispruner", "scores", "mean"),
        ("vispruner", "scope", "image"),
        ("cdpruner", "scope", "tile"),
        ("cdpruner", "newlines", "compete"),
        ("todre", "rule", "max_min"),
        ("todre", "pivot", "first"),
        ("todre", "layer", "last"),
        ("catp", "alignment", -1),
        ("catp", "alignment", True),
        ("catp", "alignment", math.inf),
        ("catp", "alignment", math.nan),
        ("catp", "alignment", "0.7"),
    ],
)
def test_a_wrong_field_is_refused(name, field, value):
    with pytest.raises(MethodFieldError, match=f"{field}=") as caught:
        method_class(name)(**{field: value})
    assert "give " in str(caught.value) or "use " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "layers"),
    [
        ("vispruner", {"scores": "received"}, {"clip": 22, "siglip": 25, "windowed": 31}),
        ("vispruner", {"scores": "received", "layer": 7}, {"clip": 7, "windowed": 7}),
        ("todre", {"pivot": "received"}, {"clip": 23, "siglip": 26, "windowed": 31}),
        ("todre", {"pivot": "received", "layer": 3}, {"clip": 3, "siglip": 3}),
        ("vispruner", {"scores": "received"}, {"one layer": 0}),
    ],
)
def test_layers(name, fields, layers):
    method = method_class(name)(**fields)
    for tower, layer in layers.items():
        assert ReceivedAttention(layer) in method.needs(shape_of(tower))


def test_what_towers_lack():
    """Only what reads CLS, or CLIP's text, is refused."""
    lacking = [
        (name, fields)
        for name, fields in CALLS
        if any(map(shape_of("siglip").lacks, method_class(name)(**fields).needs(shape_of())))
    ]
    assert lacking == [
        ("vispruner", {}),
        ("vispruner", {"important": 0.0}),
        ("vispruner", {"important": 0.3, "newlines": "keep"}),
        ("cdpruner", {}),
        ("cdpruner", {"newlines": "keep"}),
        ("todre", {}),
    ]
