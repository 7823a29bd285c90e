"""Numbers as users hold them: Python's, NumPy's, tensors of a single one."""

from __future__ import annotations

from typing import Any

_DIGITS = {2: 4, 4: 7}
"""Decimal digits that a float of so many bytes surely keeps."""


def plain(value: Any) -> Any:
    """Python's number in place of one of NumPy or of a 0-d tensor, also inside tuples; anything
    else as it is.

    Of float32 and narrower the decimal that was meant: 0.1, not 0.10000000149011612.
    """
    if type(value) is tuple:
        return tuple(map(plain, value))
    if getattr(value, "ndim", None) != 0 or not hasattr(value, "item"):
        return value
    number = value.item()
    digits = _DIGITS.get(value.itemsize)
    return float(f"{number:.{digits}g}") if isinstance(number, float) and digits else number
