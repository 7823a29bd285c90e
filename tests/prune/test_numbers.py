"""Numbers of NumPy and of tensors are numbers, and are Python's in reports and result files."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import vlmprune
from kit import zoo
from vlmprune.eval.results.records import method_record
from vlmprune.prune.budget import Budget
from vlmprune.prune.numbers import plain
from vlmprune.prune.registry import method_class

BUDGETS = [
    ("keep_ratio", 0.25),
    ("keep_ratio", 0.1),
    ("keep_tokens", 64),
    ("average_tokens", 128.0),
    ("flops_ratio", 0.3),
]


def as_users_hold_it(value: object) -> list:
    """The same number in the types of NumPy and torch; a tuple of numbers as a tuple of these."""
    if isinstance(value, tuple):
        return list(zip(*map(as_users_hold_it, value), strict=True))
    if isinstance(value, bool):
        return [np.bool_(value)]
    if isinstance(value, int):
        return [np.int64(value), np.int32(value), torch.tensor(value), np.array(value)]
    if isinstance(value, float):
        return [np.float64(value), np.float32(value), torch.tensor(value)]
    return []


@pytest.mark.parametrize(("word", "value"), BUDGETS)
def test_budgets(word, value):
    for given in as_users_hold_it(value):
        call = vlmprune.method("divprune", **{word: given})
        assert call == vlmprune.method("divprune", **{word: value})
        assert type(call.budget.value) is type(value)
        assert str(call) == str(vlmprune.method("divprune", **{word: value}))
        assert Budget(word, given) == Budget(word, value)


@pytest.mark.parametrize("given", [np.float32("nan"), np.int64(0), np.bool_(True), torch.ones(2)])
def test_what_is_no_budget_stays_none(given):
    with pytest.raises(vlmprune.BudgetError, match="keep_tokens="):
        vlmprune.method("divprune", keep_tokens=given)


@pytest.mark.parametrize("name", vlmprune.methods())
def test_fields_of_all_methods(name):
    cls = method_class(name)
    for field, value in cls().fields().items():
        for given in as_users_hold_it(value):
            made = cls(**{field: given})
            assert made == cls(**{field: value})
            assert type(getattr(made, field)) is type(value)


def test_layers_and_ratios_given_as_tuples():
    layers, ratios = (2, 4), (0.5, 0.1)
    expected = vlmprune.method("pyramiddrop", layers=layers, ratios=ratios)
    for some, shares in zip(as_users_hold_it(layers), as_users_hold_it(ratios), strict=False):
        assert vlmprune.method("pyramiddrop", layers=some, ratios=shares) == expected


def test_a_record_for_result_files_holds_python_numbers():
    call = vlmprune.method("fastv", keep_ratio=np.float32(0.1), layer=np.int64(3))
    record = json.dumps(method_record(call))
    assert json.loads(record) == method_record(vlmprune.method("fastv", keep_ratio=0.1, layer=3))


def test_patch_takes_them():
    case = zoo.CASES["llava-clip-llama"]
    model, inputs = case.model(), case.inputs()
    handle = vlmprune.patch(model, "divprune", keep_tokens=np.int64(7), remember_images=np.int64(2))
    with torch.no_grad():
        model(**inputs)
    assert handle.last.tokens_kept == [7] and type(handle.last.tokens_kept[0]) is int
    assert type(handle.last.plans[0][0].keep) is int


def test_what_is_no_number_stays_what_it_is():
    for value in ("0.5", None, True, [1, 2], torch.ones(2), {"a": 1}):
        assert plain(value) is value
    assert plain(np.str_("image")) == "image"
