"""DART: its pivots, their turns, its layer."""

from dataclasses import dataclass

import pytest
import torch
from kit.decoder import at_cut
from kit.drawn import shape_of
from kit.golden import Golden, Runner, assert_equal, choose
from torch import Tensor
from vlmprune.prune.contract import Hidden, LayerKeys, Method, TextHidden, TextKeys
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import method_class


@dataclass(frozen=True, kw_only=True)
class BySlots(method_class("dart")):
    """As released: turns in the order of a Python set of absolute positions."""

    start: int
    behind: int

    def turns(self, of_image: Tensor, of_text: Tensor) -> Tensor:
        positions = [*(self.start + of_image).tolist(), *(self.behind + of_text).tolist()]
        return torch.tensor([positions.index(place) for place in set(positions)])


def _fields(params) -> dict:
    return {key: params[key] for key in ("layer", "pivot_image", "pivot_text")}


def _official(params) -> dict:
    start = params["image_start"]
    return _fields(params) | {"start": start, "behind": start + params["n_image"]}


def _normed(golden: Golden) -> Tensor:
    hidden = golden.arrays["hidden"]
    mean = hidden.square().mean(-1, keepdim=True) + golden.params["norm_eps"]
    return hidden / mean.sqrt() * golden.arrays["norm_weight"]


def _dart(golden: Golden, method: Method) -> None:
    start, count = golden.params["image_start"], golden.params["n_image"]
    image, text = slice(start, start + count), slice(start + count, None)
    keys, normed, layer = golden.arrays["keys"].transpose(0, 1), _normed(golden), method.layer
    signals = {
        LayerKeys(layer - 1): keys[image],
        TextKeys(layer - 1): keys[text],
        Hidden(layer, normed=True): normed[image],
        TextHidden(layer, normed=True): normed[text],
    }
    plain = method_class("dart")(**_fields(golden.params))
    for chosen, wanted in ((method, "kept"), (plain, "kept_insertion")):
        kept = choose(chosen, signals, golden.params["n_kept"], layer=layer).kept
        assert_equal(kept, golden.arrays[wanted])


GOLDEN = {"dart": Runner("dart", _official, _dart, official=BySlots)}


def _signals(keys, text_keys, hidden, text, layer: int = 2) -> dict:
    return {
        LayerKeys(layer - 1): torch.tensor(keys)[:, None],
        TextKeys(layer - 1): torch.tensor(text_keys)[:, None],
        Hidden(layer, normed=True): torch.tensor(hidden),
        TextHidden(layer, normed=True): torch.tensor(text),
    }


def _turned(*degrees: float) -> list[list[float]]:
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1).tolist()


def test_by_hand():
    """Token 3 has the largest key (5 by its L1 norm, 3.6 by its L2 norm); it takes what is least
    like it, 2 (90 degrees away), then the text's pivot takes 0, which is 80 away from it."""
    signals = _signals(
        [[4.0, 0], [1, 1], [0, 0.5], [-2, 3]],
        [[0.1, 0], [0, -7]],
        _turned(0, 20, 90, 0),
        _turned(0, 80),
    )
    chosen = method_class("dart")(pivot_image=1, pivot_text=1)
    tokens = at_cut(signals, layer=2)
    assert chosen.select(tokens, 1).kept.tolist() == [3]
    assert chosen.select(tokens, 2).kept.tolist() == [2, 3]
    assert chosen.select(tokens, 3).kept.tolist() == [0, 2, 3]


def test_what_quotas_leave_over_goes_to_the_first_turns():
    draw = torch.Generator().manual_seed(0)
    sizes = ((40, 2, 3), (9, 2, 3), (40, 8), (9, 8))
    needs = method_class("dart")().needs(shape_of())
    signals = {
        need: torch.randn(size, generator=draw) for need, size in zip(needs, sizes, strict=True)
    }
    tokens, before = at_cut(signals, layer=2), set()
    for keep in range(4, 12):  # pivots, then a token for each turn
        kept = set(method_class("dart")().select(tokens, keep).kept.tolist())
        assert len(kept) == keep and before < kept
        before = kept


def test_a_text_of_one_token_has_one_pivot():
    draw = torch.Generator().manual_seed(0)
    sizes = ((20, 2, 3), (1, 2, 3), (20, 8), (1, 8))
    needs = method_class("dart")().needs(shape_of())
    signals = {
        need: torch.randn(size, generator=draw) for need, size in zip(needs, sizes, strict=True)
    }
    for keep in range(1, 20):
        assert method_class("dart")().select(at_cut(signals, layer=2), keep).count == keep


def test_layers():
    shape = shape_of()
    for given, layer in ((2, 2), (5, 5), (-1, 31)):
        assert [cut.layer for cut in method_class("dart")(layer=given).cuts(shape)] == [layer]
    for wrong in (32, -32):
        with pytest.raises(MethodFieldError, match=f"layer={wrong} "):
            method_class("dart")(layer=wrong).cuts(shape)
    for field, wrong in (("layer", 0), ("pivot_image", 0), ("pivot_text", -1)):
        with pytest.raises(MethodFieldError, match=f"{field}={wrong} "):
            method_class("dart")(**{field: wrong})
