"""Numbers that look drawn, from a seed and whole numbers alone: no generator, whose streams may
change, and the same on every device."""

from __future__ import annotations

from torch import Tensor

_MASK = 2**32 - 1


def drawn(numbers: Tensor, seed: int) -> Tensor:
    """For each whole number another one, of 32 bits; equal numbers give equal ones.

    Args:
        numbers: int64, of any shape.
    """
    return _mixed(_mixed(numbers + 1) + (seed * 0x9E3779B9 & _MASK))


def _mixed(numbers: Tensor) -> Tensor:
    """MurmurHash3's last step, of each number."""
    numbers = numbers & _MASK
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        numbers = (numbers ^ (numbers >> shift)) * factor & _MASK
    return numbers ^ (numbers >> 16)
