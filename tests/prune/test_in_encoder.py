"""What every method inside the vision encoder holds: what it declares, exact counts that fall, no
waiting, no change of what it is given, 16-bit signals."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import inside
from vlmprune.eval.checking.waiting import no_waiting
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import Decoder, InEncoder, ModelShape
from vlmprune.prune.declared import check_declared
from vlmprune.prune.errors import BudgetError, UnsupportedModelError
from vlmprune.prune.reductions import counts_of
from vlmprune.prune.registry import method_class, method_names

NAMES = [name for name in method_names() if issubclass(method_class(name), InEncoder)]
DECODER = Decoder(num_layers=4, hidden_size=8, intermediate_size=8)
EVERY = pytest.mark.parametrize("name", NAMES)


def runs(method: InEncoder, tower: str) -> bool:
    try:
        method.blocks(inside.TOWERS[tower])
    except UnsupportedModelError:
        return False
    return True


CASES = [(n, tower) for n in NAMES for tower in inside.TOWERS if runs(method_class(n)(), tower)]


def test_all_methods_but_one_run_on_every_encoder():
    missing = {(n, tower) for n in NAMES for tower in inside.TOWERS} - set(CASES)
    assert missing == {("expedit", "windowed")}


@pytest.mark.parametrize(("name", "tower"), CASES)
def test_declarations_hold(name, tower):
    method = method_class(name)()
    shape = ModelShape(tower=inside.TOWERS[tower], decoder=DECODER)
    check_declared(method, shape)
    assert not any(shape.lacks(need) for need in method.needs(shape))


@pytest.mark.parametrize(("name", "tower"), CASES)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=4), st.data())
def test_counts_are_exact_and_fall(name, tower, pictures, data):
    """Of each picture of an image; counts that are out of reach are said."""
    method, tower = method_class(name)(), inside.TOWERS[tower]
    keep = data.draw(st.integers(0, sum(pictures)))
    try:
        counts = counts_of(method, tower, pictures, keep)
    except BudgetError:
        assert name in ("mctf", "tome")
        return
    assert sum(one[-1] for one in counts) == keep
    for rows, one in zip(pictures, counts, strict=True):
        assert list(one) == sorted(one, reverse=True) and one[0] <= rows


@pytest.mark.parametrize(("name", "tower"), CASES)
def test_a_reduction_does_not_wait_and_leaves_its_signals(name, tower):
    method, tower = method_class(name)(), inside.TOWERS[tower]
    for cut in method.blocks(tower):
        rows = inside.drawn(method, tower, 36, cut=cut, grid=(6, 6), sized=True)
        before = {need: value.clone() for need, value in rows.signals.items()}
        with no_waiting():
            made = method.reduce(rows, 20)
        assert made.count == 20
        if method.restores:
            with no_waiting():
                method.restore(torch.rand(2, 36, 5), torch.rand(2, 20, 5), made)
        assert all(torch.equal(rows.signals[need], value) for need, value in before.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY
def test_16_bit_signals_are_compared_in_32(name, dtype):
    """The same choice as of the same numbers in float32."""
    method, tower = method_class(name)(), inside.TOWERS["clip"]
    rows = inside.drawn(method, tower, 36, grid=(6, 6))
    made = []
    for kind in (dtype, torch.float32):
        for need, value in rows.signals.items():
            rows.signals[need] = value.to(dtype).to(kind)
        made.append(inside.checked(method, rows, 20))
    assert inside.same(*made)
    values = torch.rand(2, 36, 5).to(dtype)
    assert made[0].apply(values).dtype == dtype


@EVERY
def test_without_a_budget_only_what_has_a_number_runs(name):
    """ToMe is given one; the others have the paper's, or need a budget."""
    method = method_class(name)()
    if name == "tome":
        assert method.wants_budget
        method = method_class(name)(r=4)
    if method.wants_budget:
        with pytest.raises(BudgetError, match=f"{name} needs a budget"):
            method.block_counts(inside.TOWERS["clip"], 576, None)
        MethodCall(method, Budget("keep_ratio", 0.5))
        return
    assert MethodCall(method, None).adaptive
    counts = method.block_counts(inside.TOWERS["clip"], 576, None)
    assert 1 <= counts[-1] < 576 and list(counts) == sorted(counts, reverse=True)
