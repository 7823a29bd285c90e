"""The file that a bench writes its report to, again after every step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..results.records import ResultsError


def write_report(report: Mapping[str, Any] | Sequence[Mapping[str, Any]], output_path: str) -> None:
    """All or nothing, so that an interrupt leaves the last whole report.

    Raises:
        ResultsError: the file cannot be written.
    """
    path = Path(output_path)
    try:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ResultsError(f"{output_path!r} cannot be written: {error.strerror}.") from error
