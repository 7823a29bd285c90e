"""V2Drop: distances between layers, its published schedule, what a budget makes of it."""

import pytest
import torch
from kit.decoder import at_cut, average, layers_of, stages
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from vlmprune.prune.contract import Hidden, Method
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import method, method_class


def _v2drop(golden: Golden, method: Method) -> None:
    arrays, params = golden.arrays, golden.params
    alive = torch.arange(params["n_image"])
    layers = [cut.layer for cut in method.cuts(CLIP_L)]
    assert layers == params["layers_0based"]
    counts = method.published_counts(CLIP_L, len(alive))
    assert list(counts) == params["keep_counts"]
    for stage, (layer, keep) in enumerate(zip(layers, counts, strict=True)):
        signals = {
            Hidden(layer - 1): arrays[f"prev_{stage}"][alive],
            Hidden(layer): arrays[f"cur_{stage}"][alive],
        }
        alive = alive[choose(method, signals, keep, layer=layer, alive=alive).kept]
        assert_equal(alive, arrays[f"kept_{stage}"])
    assert_equal(alive, arrays["kept"])


GOLDEN = {
    "v2drop": Runner(
        "v2drop",
        lambda p: {"layers": tuple(p["layers_0based"]), "ratios": tuple(p["ratios"][:2])},
        _v2drop,
    ),
}


def test_what_moves_least_is_dropped():
    """Distances 5, 0, 2 and 3, whatever the hidden states are."""
    before = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)) * 100
    steps = torch.tensor([[3.0, 4.0], [0, 0], [0, -2], [3, 0]])
    tokens = at_cut({Hidden(2): before, Hidden(3): before + steps}, layer=3)
    for keep, kept in ((1, [0]), (2, [0, 3]), (3, [0, 2, 3])):
        assert method_class("v2drop")().select(tokens, keep).kept.tolist() == kept


@pytest.mark.parametrize(
    ("num_tokens", "published"),
    [
        (576, [(3, 288), (17, 144), (22, 1)]),
        (3, [(3, 1)]),
        (2, [(3, 1)]),
        (1, []),
    ],
)
def test_published_counts(num_tokens, published):
    assert stages(method("v2drop"), num_tokens) == published


def test_the_published_average():
    assert average(method("v2drop"), 576) == (3 * 576 + 14 * 288 + 5 * 144 + 10) / 32


def test_a_budget_is_reached_at_the_second_cut():
    assert stages(method("v2drop", keep_tokens=64), 576) == [(3, 128), (17, 64)]
    assert stages(method("v2drop", keep_ratio=0.75), 576) == [(17, 432)]
    assert stages(method("v2drop", keep_tokens=1), 576) == [(3, 2), (17, 1)]
    for goal in (192, 128, 64):
        assert average(method("v2drop", average_tokens=goal), 576) == pytest.approx(goal, abs=1)


def test_layers_on_other_depths():
    assert layers_of("v2drop", 32) == [3, 17, 22]
    assert layers_of("v2drop", 28) == [3, 15, 19]
    assert layers_of("v2drop", 4) == [1, 2, 3]
    assert layers_of("v2drop", 28, layers=(3, 16, 22)) == [3, 16, 22]


@pytest.mark.parametrize(
    "fields",
    [
        {"layers": (3, 17)},
        {"layers": [3, 17, 22]},
        {"ratios": (0.5,)},
        {"ratios": 0.5},
        {"ratios": (0.5, 1.5)},
    ],
)
def test_wrong_fields_are_refused(fields):
    (field,) = fields
    with pytest.raises(MethodFieldError, match=f"{field}="):
        method_class("v2drop")(**fields)
