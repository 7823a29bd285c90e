"""`vlmprune check-method`: a line for every property of a method on every layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ...prune.contract import Method
from ..arguments.check_method import CheckRequest
from ..checking.check import known, made
from ..checking.properties import LAYOUTS, PROPERTIES, Finding, check
from ..console import stdout
from ..importing import import_methods


def run(request: CheckRequest) -> int:
    """The command. Returns the exit code."""
    method, layouts = request.method, request.layouts
    names = import_methods(method) if method.endswith(".py") else [method]
    subjects = [made(name) for name in names]
    failed = False
    for subject in subjects:
        failed |= _report(subject, check(subject, known(layouts or LAYOUTS)))
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
