"""FitPrune: its scores, its tables, what budgets and other depths make of them."""

import pytest
import torch
from kit.decoder import at_cut, average, entering, stages
from kit.golden import Golden, Runner, assert_equal, choose
from vlmprune.prune.contract import Method, TextAttention
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import method, method_class

REDUCTIONS = (10, 20, 30, 40, 50, 55, 60, 70, 80, 90)


def _signals(cut: int, text, image) -> dict:
    return {
        TextAttention(cut - 1, rows="text", heads="max"): torch.as_tensor(text),
        TextAttention(cut - 1, rows="image", heads="max"): torch.as_tensor(image),
    }


def _fitprune(golden: Golden, method: Method) -> None:
    attention, params = golden.arrays["attn"].amax(0), golden.params
    start, alive = params["image_start"], params["n_alive"]
    image, cut = slice(start, start + alive), params["layer_0based"] + 1
    text = attention[start + alive :, image].mean(0)
    signals = _signals(cut, text, attention[image, image].mean(0))
    kept = choose(method, signals, alive - params["remove"], layer=cut).kept
    assert_equal(kept, golden.arrays["kept"])
    before, after = entering_of(params["reduction"])[cut - 1 : cut + 1]
    assert before - after == params["remove"]


def entering_of(reduction: int) -> list[int]:
    return entering(method("fitprune", reduction=reduction), 576)


GOLDEN = {"fitprune": Runner("fitprune", lambda p: {"reduction": p["reduction"]}, _fitprune)}


def test_both_must_attend():
    text, image = [0.5, 0.1, 0.4, 0.0], [0.1, 0.6, 0.3, 0.9]
    tokens = at_cut(_signals(1, text, image), layer=1)
    for keep, kept in ((1, [2]), (2, [1, 2]), (3, [0, 1, 2])):
        assert method_class("fitprune")().select(tokens, keep).kept.tolist() == kept


SUMS = (66, 149, 264, 336, 403, 424, 449, 488, 514, 539)


@pytest.mark.parametrize(("reduction", "last"), list(zip(REDUCTIONS, SUMS, strict=True)))
def test_published_sums(reduction, last):
    call = method("fitprune", reduction=reduction)
    assert stages(call, 576)[-1][1] == 576 - last
    assert entering(call, 1152)[-1] == 2 * (576 - last)


def test_a_published_table():
    found = entering_of(90)
    assert found[:8] == [576, 314, 161, 81, 62, 49, 48, 46] and found[-1] == 37


def test_a_larger_reduction_keeps_fewer():
    averages = [average(method("fitprune", reduction=r), 576) for r in REDUCTIONS]
    assert averages == sorted(averages, reverse=True)


@pytest.mark.parametrize("depth", [2, 4, 5, 24, 28, 40, 80])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_other_depths_end_with_as_many(depth, reduction):
    call = method("fitprune", reduction=reduction)
    found = entering(call, 576, depth)
    assert found == sorted(found, reverse=True)
    assert found[-1] == call.method.most(576)
    assert entering(method("fitprune", keep_tokens=64), 576, depth)[-1] == 64


def test_a_budget_keeps_the_proportions():
    """The table of 60 % ends with 127 tokens, 449 gone: a budget of as many is the table."""
    assert stages(method("fitprune", keep_tokens=127), 576) == stages(method("fitprune"), 576)
    assert entering(method("fitprune", keep_tokens=64), 576)[3] == 576 - round(136 * 512 / 449)
    for reduction, goal in ((60, 192), (90, 128), (90, 64)):
        call = method("fitprune", reduction=reduction, average_tokens=goal)
        assert average(call, 576) == pytest.approx(goal, abs=1)


@pytest.mark.parametrize("wrong", [0, 65, 0.6, "60"])
def test_wrong_fields_are_refused(wrong):
    with pytest.raises(MethodFieldError, match=r"reduction=.* 55, 60, 70"):
        method_class("fitprune")(reduction=wrong)
