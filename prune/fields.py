"""Checks of method fields, run when a method is constructed."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from .errors import MethodFieldError


def check_int(field: str, value: Any, *, at_least: int | None = None, hint: str) -> None:
    """Refuse everything but a whole number; `hint` tells what to type."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or (at_least is not None and value < at_least):
        raise MethodFieldError(f"{field}={value!r} is not possible: {hint}.")


def check_layer(field: str, value: object) -> None:
    """Refuse everything but a layer number or None. The model's depth is not known here."""
    if value is not None:
        hint = "give a layer number (negative counts from the end), or None for the paper's"
        check_int(field, value, hint=hint)


def check_number(field: str, value: Any, *, positive: bool = False) -> None:
    """Refuse everything but a finite number of at least 0, or above it."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and isfinite(value) and (value > 0 if positive else value >= 0)):
        allowed = "give a number above 0" if positive else "give a number, 0 or more"
        raise MethodFieldError(f"{field}={value!r} is not possible: {allowed}.")


def check_fraction(field: str, value: Any) -> None:
    """Refuse everything but a number in 0..1."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 <= value <= 1):  # also refuses nan
        raise MethodFieldError(f"{field}={value!r} is not possible: give a number, 0 to 1.")


def check_share(field: str, value: Any) -> None:
    """Refuse everything but a number above 0, up to 1."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and 0 < value <= 1):  # also refuses nan
        raise MethodFieldError(
            f"{field}={value!r} is not possible: give a number above 0, up to 1 (all)."
        )


def check_flag(field: str, value: object) -> None:
    """Refuse everything but True and False."""
    if not isinstance(value, bool):
        raise MethodFieldError(f"{field}={value!r} is not possible: give True or False.")


def check_choice(field: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse everything but one of the words `allowed`."""
    if value not in allowed:
        words = " or ".join(map(repr, allowed))
        raise MethodFieldError(f"{field}={value!r} is not possible: use {words}.")
