"""What functions returned that a method puts into its signals."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import Signal
from ..errors import MethodAnswerError
from .answer import said


def check_read(signal: Signal, given: object, count: int) -> Tensor:
    """What the `read` of a declared signal returned: a number for each of `count` tokens.

    Raises:
        MethodAnswerError: it returned something else.
    """
    if not isinstance(given, Tensor) or given.shape != (count,):
        raise MethodAnswerError(
            f"The read function of {type(signal).__name__} returned {said(given)}: it must be one "
            f"number for each of the {count} tokens that it is given, a tensor ({count},)."
        )
    return given


def asked_rows(columns: Tensor, given: object) -> Tensor:
    """Those of the text `columns` (T,) that a rule for rows asks, by what it returned.

    Raises:
        MethodAnswerError: it returned something else than (T,) bools, or asks none.
    """
    count = len(columns)
    if not isinstance(given, Tensor) or given.dtype != torch.bool or given.shape != (count,):
        raise MethodAnswerError(
            f"A rule for rows returned {said(given)}: it must tell of each of the {count} text "
            f"tokens whether it is asked, a bool tensor ({count},)."
        )
    asked = columns[given]
    if not len(asked):
        raise MethodAnswerError(
            f"A rule for rows asks none of the {count} text tokens: it must ask at least one."
        )
    return asked
