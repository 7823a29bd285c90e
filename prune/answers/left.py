"""What methods returned that leave heads or neurons out of layers: the numbers of those left."""

from __future__ import annotations

from torch import Tensor

from ..contract import InDecoder
from .answer import Answer, said


def check_left(
    method: InDecoder,
    call: str,
    given: object,
    shape: tuple[int, ...],
    count: int,
    what: str,
    values: bool,
) -> Tensor:
    """What `choose_heads` or `core_neurons` returned, of `count` heads or neurons.

    Raises:
        MethodAnswerError: the rule that is broken, the value, and what to return instead.
    """
    instead = f"the numbers of exactly {shape[-1]} of the {count}, int64 {shape}, ascending"
    answer = Answer(method, call, instead)
    left = answer.integers(what, given)
    if left.shape != shape:
        answer.refuse(f"{what} {said(left)}", f"{what} must be {shape}")
    if values:
        answer.ascending(what, left, count, what)
    return left
