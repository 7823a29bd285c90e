"""`vlmprune check-method`: a line for every property of a method on every layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from ...prune.contract import Method
from ...prune.errors import MethodFieldError, did_you_mean
from ...prune.registry import method_class
from ..arguments.check_method import CheckRequest
from ..checking.properties import LAYOUTS, PROPERTIES, Finding, check
from ..console import stdout
from ..importing import import_methods
from ..words.parts import parse


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
    return list(check(_made(method), _known(layouts)))


def run(request: CheckRequest) -> int:
    """The command. Returns the exit code."""
    method, layouts = request.method, request.layouts
    names = import_methods(method) if method.endswith(".py") else [method]
    subjects = [_made(name) for name in names]
    failed = False
    for subject in subjects:
        failed |= _report(subject, check(subject, _known(layouts or LAYOUTS)))
    return int(failed)


def _report(subject: Method, findings: Iterator[Finding]) -> bool:
    """Print what is found as it is found; whether anything failed, or nothing could be tried."""
    console, counts = stdout(), Counter[str]()
    wide, wider = max(map(len, LAYOUTS)), max(map(len, PROPERTIES))
    for found in findings:
        counts[found.state] += 1
        line = f"{found.state:4}  {found.layout:{wide}}  {found.property:{wider}}  {found.reason}"
        style = {"FAIL": "bold red", "n/a": "dim"}.get(found.state)
        console.print(line.rstrip(), markup=False, style=style)
    tried = counts["pass"] + counts["FAIL"]
    said = f"{subject.name}: {counts['pass']} pass, {counts['FAIL']} FAIL, {counts['n/a']} n/a"
    console.print(said if tried else f"{said}: it runs on none of the layouts", markup=False)
    return bool(counts["FAIL"]) or not tried


def _made(method: str | type[Method] | Method) -> Method:
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


def _known(layouts: Iterable[str]) -> list[str]:
    listed = list(layouts)
    for layout in listed:
        if layout not in LAYOUTS:
            raise MethodFieldError(f"Unknown layout {layout!r}. {did_you_mean(layout, LAYOUTS)}")
    return listed
