"""Devices that are not there: tensors in memory that say they are on `xla:0`, `xla:1` and so on,
and refuse to meet tensors of another device, as those of an accelerator do.

    with Devices():
        model.to("xla:0")

`xla` is a device type that PyTorch knows and this build has no kernels of. Everything is computed
on the CPU, so that results are bit-equal to those of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CPU = torch.device("cpu")
aten = torch.ops.aten
CROSSING = {aten._to_copy.default, aten.copy_.default}
"""What brings tensors from one device to another."""
TAKES_CPU_INDICES = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
}


VALUES = {"item", "__int__", "__index__", "__float__", "__bool__"}
ANYWHERE = torch.device("meta")
"""Scalars that PyTorch makes to go along with a tensor."""


class Elsewhere(torch.Tensor):
    """A tensor in memory that says it is on another device."""

    held: torch.Tensor
    place: torch.device

    @staticmethod
    def __new__(cls, held: torch.Tensor, place: torch.device) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
            requires_grad=False,
        )
        made.held, made.place = held, place
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.place

    def __repr__(self, **kwargs: Any) -> str:
        return f"Elsewhere({self.held!r}, {self.place})"

    def tolist(self) -> Any:
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return dispatch(function, args, kwargs or {})


class _Values(TorchFunctionMode):
    """What does not come by as an operation: `torch.tensor` and `item` go to the memory of a device
    by themselves, and `to(other)` asks PyTorch's own notion of where the other one is."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in VALUES and isinstance(args[0], Elsewhere):
            return function(args[0].held)
        if function is torch.Tensor.to and isinstance(args[1] if args[1:] else None, torch.Tensor):
            return args[0].to(args[1].device, args[1].dtype)
        if function not in (torch.tensor, torch.as_tensor) or kwargs.get("device") is None:
            return function(*args, **kwargs)
        place = kwargs.pop("device")
        return function(*each(_held, args), **kwargs).to(place)


class Devices(ExitStack):
    """Within it, tensors can be made on devices that are not there."""

    def __enter__(self) -> Devices:
        super().__enter__()
        self.enter_context(_Operations())
        self.enter_context(_Values())
        return self


def dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors: list[torch.Tensor] = []
    each(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, args)
    each(lambda x: tensors.append(x) if isinstance(x, torch.Tensor) else None, kwargs)
    places = {_place(x) for x in tensors if x.dim() or isinstance(x, Elsewhere)}
    places -= {ANYWHERE}
    if function in TAKES_CPU_INDICES:
        places = {_place(args[0])} | (places - {CPU})
    wanted = kwargs.get("device")
    if function not in CROSSING and len(places) > 1:
        raise RuntimeError(
            f"{function}: expected all tensors to be on the same device, but found "
            f"{sorted(map(str, places))}"
        )
    if wanted is not None:
        kwargs = {**kwargs, "device": CPU}
        place = torch.device(wanted)
    elif function in CROSSING:
        place = _place(args[0])
    else:
        place = next(iter(places), CPU)
    found = function(*each(_held, args), **each(_held, kwargs))
    if function._schema.is_mutable:  # what was changed in place is handed back as it came
        given = {id(_held(x)): x for x in tensors}
        return each(lambda x: given.get(id(x), x), found)
    if place == CPU:
        return found
    return each(lambda x: Elsewhere(x, place) if isinstance(x, torch.Tensor) else x, found)


def each(change: Callable[[Any], Any], value: Any) -> Any:
    """`change` of everything in tuples, lists and dicts, which is all that operations are given and
    give back: torch's `tree_map` knows more, and would take most of the time of the tests."""
    if isinstance(value, tuple | list):
        return type(value)([each(change, x) for x in value])
    if isinstance(value, dict):
        return {key: each(change, x) for key, x in value.items()}
    return change(value)


def _place(tensor: torch.Tensor) -> torch.device:
    return tensor.place if isinstance(tensor, Elsewhere) else CPU


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value
