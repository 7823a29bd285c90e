"""What all answers have in common: who gave one in which call, and the error that refuses it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..contract import Method
from ..errors import MethodAnswerError
from ..registry import is_shipped


def looks_at_values(method: Method, debug: bool) -> bool:
    """Whether numbers in the method's tensors are checked too, for which the host waits."""
    return debug or not is_shipped(type(method))


class Answer:
    """An answer that is looked at: who gave it, in which call, what it should have been."""

    def __init__(self, method: Method, call: str, instead: str) -> None:
        self.method, self.call, self.instead = method, call, instead

    def refuse(self, value: str, rule: str) -> NoReturn:
        refuse(self.method, self.call, value, rule, self.instead)

    def integers(self, field: str, given: object) -> Tensor:
        if not isinstance(given, Tensor) or given.dtype != torch.int64:
            self.refuse(f"{field} {said(given)}", f"{field} must be a tensor of int64")
        return given

    def numbers(self, field: str, given: object) -> Tensor:
        tensor = self.integers(field, given)
        if tensor.dim() != 1:
            self.refuse(f"{field} {said(tensor)}", f"{field} must have one dimension")
        return tensor

    def scores(self, given: object, shapes: Sequence[tuple[int, ...]]) -> None:
        floats = isinstance(given, Tensor) and given.is_floating_point()
        if given is not None and not (floats and given.shape in shapes):  # type: ignore[attr-defined]
            self.refuse(
                f"scores {said(given)}",
                f"scores must be {' or '.join(map(str, shapes))} floats, one for each it was given",
            )

    def within(self, field: str, numbers: Tensor, stop: int, what: str) -> None:
        wrong = numbers[(numbers < 0) | (numbers >= stop)]
        if len(wrong):
            self.refuse(f"{field} with {int(wrong[0])}", f"{what} are numbered 0 to {stop - 1}")

    def ascending(self, field: str, numbers: Tensor, stop: int, what: str) -> None:
        """Numbers (..., K) of `stop` things, each once, in order."""
        self.within(field, numbers, stop, what)
        one, two = numbers[..., :-1], numbers[..., 1:]
        if (same := one[one == two]).numel():
            self.refuse(f"{field} with {int(same[0])} twice", "each number may be there once")
        if (wrong := one > two).any():
            pair = f"{int(one[wrong][0])} before {int(two[wrong][0])}"
            self.refuse(f"{field} with {pair}", "numbers must ascend: sort them")


def refuse(method: Method, call: str, value: str, rule: str, instead: str) -> NoReturn:
    raise MethodAnswerError(f"{method.name}.{call} returned {value}, but {rule}. Return {instead}.")


def said(value: object) -> str:
    """A value in a few words: a tensor by its dtype and shape, others as they are printed."""
    if isinstance(value, Tensor):
        return f"of {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"


def listed(tensor: Tensor) -> str:
    """The numbers of a tensor (K,), the first twelve of them."""
    numbers = tensor.tolist()
    return str(numbers) if len(numbers) <= 12 else f"[{str(numbers[:12])[1:-1]}, ...]"
