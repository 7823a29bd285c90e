"""`vlmprune.check_method`: what holds of a method, named in any way that one may name it."""

from __future__ import annotations

from collections.abc import Iterable

from ...prune.contract import Method
from ...prune.errors import MethodFieldError, did_you_mean
from ...prune.registry import method_class
from ..words.parts import parse
from .properties import LAYOUTS, Finding, check


def check_method(
    method: str | type[Method] | Method, layouts: Iterable[str] = LAYOUTS
) -> list[Finding]:
    """What holds of a method on tiny models of all layouts, offline, in about a minute.

    Args:
        method: a name with or without fields (`fastv:layer=1`), a class, or one with fields set.
        layouts: some of `LAYOUTS`.

    Returns:
        a finding for each property and layout: `state` is `pass`, `FAIL` or `n/a`, with a reason.

    Raises:
        UnknownMethodError, MethodFieldError: there is no such method or layout.
    """
    return list(check(made(method), known(layouts)))


def made(method: str | type[Method] | Method) -> Method:
    """The method itself; see `check_method`."""
    if isinstance(method, Method):
        return method
    if isinstance(method, type):
        return method_class(method.name)() if hasattr(method, "name") else _named(method)
    parts = parse(method)
    if len(parts) != 1 or not parts[0].open:
        raise MethodFieldError(
            f"{method!r} is more than one method with its fields: check one at a time, without a "
            f"budget, e.g. fastv:layer=1."
        )
    return parts[0].method


def _named(cls: type[Method]) -> Method:
    raise MethodFieldError(
        f'{cls.__name__} has no name: put @register("name") above the class, from '
        f"vlmprune.prune.registry."
    )


def known(layouts: Iterable[str]) -> list[str]:
    """The layouts, each of which there is."""
    listed = list(layouts)
    for layout in listed:
        if layout not in LAYOUTS:
            raise MethodFieldError(f"Unknown layout {layout!r}. {did_you_mean(layout, LAYOUTS)}")
    return listed
