"""A choice does not wait for the device: the host reads no value of a tensor, and no size depends
on one. On a GPU either would stop the host until all work queued before it is done.
"""

from contextlib import contextmanager

import pytest
import torch
from test_selection import CHOICES, TILINGS, at, make_tokens
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Tiling

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default,  # item, tolist, bool, int
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,  # without output_size
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.equal.default,
}
EXCEPTIONS = {
    "random": "the CPU draws, the same tokens on every device, from a seed of the pixels",
    "catp": "a CPU reads only the rows that changed, an accelerator all up to STORE_UP_TO",
}
"""Choices that wait, and why."""


class _NoValues(TorchFunctionMode):
    """Refuses what reads values without an operation."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in ("tolist", "numpy", "__array__"), f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


class _NoOperations(TorchDispatchMode):
    """Refuses operations that wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function is aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        assert function not in WAITS, f"{function} waits for the device"
        assert not masks, "an index by a mask waits for the device"
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waiting():
    with _NoValues(), _NoOperations():
        yield


def cases():
    """Choices by a budget, before the LLM and in the decoder, of plain and tiled images."""
    for choice in CHOICES:
        yield choice, (12, 12)
        if "@" not in choice:
            yield choice, "2 x 2"
            yield choice, "video"


@pytest.mark.parametrize(("choice", "image"), list(cases()))
def test_a_choice_does_not_wait_for_the_device(choice, image):
    method, layer = at(choice)
    tiling = TILINGS[image] if isinstance(image, str) else Tiling.single(*image)
    tokens = make_tokens(method, tiling, layer=layer)
    keep = max(1, tokens.num_tokens // 3)
    expected = select(method, tokens, keep)  # what depends on the tiling alone is made once
    if choice in EXCEPTIONS:
        with pytest.raises(AssertionError, match="waits"), no_waiting():
            select(method, tokens, keep)
        return
    with no_waiting():
        found = select(method, tokens, keep)
    assert torch.equal(found.kept, expected.kept)


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: torch.arange(3).repeat_interleave(x.long()),
    ],
    ids=["item", "bool", "nonzero", "mask", "tolist", "repeat_interleave"],
)
def test_waiting_is_noticed(waiting):
    with pytest.raises(AssertionError, match="waits"), no_waiting():
        waiting(torch.ones(3))
