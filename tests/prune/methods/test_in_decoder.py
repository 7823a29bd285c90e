"""What CoreMatching, SpAtten, ToDRE and CATP hold in the decoder: exact counts, ties, places."""

import math

import pytest
import torch
from kit.decoder import TILED, at_cut, in_decoder, model, stages
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.contract import LayerSignal, Place, Selection
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import select


@pytest.mark.parametrize("words", [{"keep_ratio": 1.0}, {"keep_tokens": 576}, {"keep_tokens": 999}])
@pytest.mark.parametrize("name", ["todre", "catp", "spatten", "corematching"])
def test_full_budget_plans_nothing(name, words):
    for depth in (4, 6, 32):
        for images in ("query", "context"):
            assert stages(method(name, **words), 576, depth, images) == []


CUTS = [
    ("corematching", {}, 6),
    ("corematching", {"reference": "question"}, 6),
    ("spatten", {}, 5),
    ("spatten", {}, 31),
    ("catp", {}, 7),
    ("catp", {}, 8),
]


@pytest.mark.parametrize(("name", "fields", "layer"), CUTS)
def test_every_count_is_exact_and_ties_go_to_the_lower_index(name, fields, layer):
    for constant in (False, True):
        method, tokens = in_decoder(name, fields, layer, constant=constant)
        for keep in range(1, tokens.num_tokens + 1):
            kept = select(method, tokens, keep).kept.tolist()
            assert len(kept) == keep and kept == sorted(set(kept))
            if constant:
                assert kept == list(range(keep))


@pytest.mark.parametrize(("name", "fields", "layer"), CUTS)
def test_inputs_stay_and_results_repeat(name, fields, layer):
    method, tokens = in_decoder(name, fields, layer)
    before = {signal: value.clone() for signal, value in tokens.signals.items()}
    first, second = (method.select(tokens, 11) for _ in range(2))
    assert isinstance(first, Selection) and torch.equal(first.kept, second.kept)
    for signal, value in tokens.signals.items():
        assert value._version == 0 and torch.equal(value, before[signal])


@pytest.mark.parametrize(("name", "fields", "layer"), CUTS)
def test_nothing_waits_for_the_device(name, fields, layer):
    method, tokens = in_decoder(name, fields, layer)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        signals = {signal: mode.from_tensor(t) for signal, t in tokens.signals.items()}
        faked = at_cut(signals, layer=layer, tiling=TILED)
        assert method.select(faked, 9).count == 9


def test_places():
    both, before = (Place.BEFORE_LLM, Place.DECODER), (Place.BEFORE_LLM,)
    for name in ("todre", "catp"):
        cls = method_class(name)
        assert cls().places == both and cls(late=False).places == before
        assert cls.place is Place.BEFORE_LLM
        late = [s for s in cls(late=False).needs(model()) if isinstance(s, LayerSignal)]
        assert not late
    for name in ("corematching", "spatten"):
        assert method_class(name)().places == (Place.DECODER,)
        assert method_class(name).positions == "original"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("corematching", {"rho": 1.5}),
        ("corematching", {"beta": math.nan}),
        ("corematching", {"reference": "word"}),
        ("corematching", {"layer": 2.0}),
        ("todre", {"tau": 1.2}),
        ("todre", {"late": "no"}),
        ("catp", {"late": 0}),
        ("catp", {"similarity": -0.1}),
        ("catp", {"similarity": math.inf}),
        ("catp", {"layer": "6"}),
    ],
)
def test_a_wrong_field_is_refused(name, fields):
    (field,) = fields
    with pytest.raises(MethodFieldError, match=f"{field}=") as caught:
        method_class(name)(**fields)
    assert "give " in str(caught.value) or "use " in str(caught.value)
