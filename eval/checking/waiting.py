"""Finding out, without a GPU, whether something would wait for one: the host reads a value of a
tensor, or a size depends on one. On a GPU either stops the host until all work queued before it is
done.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_READING = {"tolist", "numpy", "__array__", "cpu"}
_WAITING = {
    aten._local_scalar_dense.default,  # item, tolist, bool, int
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,  # without output_size
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.equal.default,
}


class WaitsError(RuntimeError):
    """Something would wait for the device; says what."""


class _NoValues(TorchFunctionMode):
    """Refuses what reads values without an operation."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in _READING:
            raise WaitsError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


class _NoOperations(TorchDispatchMode):
    """Refuses operations that wait."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        masks = function is aten.index.Tensor and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if masks:
            raise WaitsError("an index by a mask waits for the device")
        if function in _WAITING:
            raise WaitsError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it, waiting for the device is an error, also on a CPU.

    Raises:
        WaitsError: at what waits.
    """
    with _NoValues(), _NoOperations():
        yield
