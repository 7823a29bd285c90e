"""`vlmprune report`: result files as a page, as Markdown, CSV, LaTeX, or as lm-eval writes them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..arguments.report import ReportRequest
from ..report.baselines import hard_table
from ..report.cells import Section, read_cells, sections
from ..results.records import ResultsError

SUFFIXES = {".html": "html", ".htm": "html", ".md": "markdown", ".csv": "csv", ".tex": "latex"}


def run(request: ReportRequest) -> int:
    """The command. Returns the exit code."""
    output = request.output
    chosen = request.format or _format_of(output)
    if output is None and chosen == "lm-eval":
        raise ResultsError("--format lm-eval writes several files: give a folder with -o DIR.")
    found = sections(read_cells([Path(path) for path in request.runs]))
    if request.hard:
        _refuse_without_hard(found, chosen)
    if chosen == "lm-eval" and output is not None:
        _write_lm_eval(found, Path(output))
        return 0
    text = _render(found, chosen, request)
    if output is None:
        sys.stdout.write(text)
        return 0
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(text, encoding="utf-8", newline="")
    except OSError as error:
        raise _unwritable(output, error) from error
    sys.stderr.write(f"report of {_counted(found)}: {output}\n")
    return 0


def _render(found: Sequence[Section], chosen: str, request: ReportRequest) -> str:
    if chosen == "html":
        from ..report import html

        return html.render(found, request.examples, with_hard=request.hard)
    if chosen == "csv":
        from ..report import csv_file

        return csv_file.render(found, with_hard=request.hard)
    if chosen == "latex":
        from ..report import latex

        return latex.render(found)
    from ..report import markdown

    return markdown.render(found, request.examples, with_hard=request.hard)


def _refuse_without_hard(found: Sequence[Section], chosen: str) -> None:
    """Refuse to show hard questions where they are not known, or have no place.

    Raises:
        ResultsError: it says what to type.
    """
    if chosen not in ("html", "markdown", "csv"):
        raise ResultsError(f"--hard is no part of {chosen}: end -o on .html, .md or .csv.")
    if not any(hard_table(section) for section in found):
        raise ResultsError(
            "--hard: no cell of downsample stands beside another one at equal tokens: run "
            "`vlmprune sweep --methods downsample --budgets ...` with the same questions and "
            "output_path first."
        )


def _format_of(output: str | None) -> str:
    """By the end of the name: what has none is a folder."""
    if output is None:
        return "markdown"
    path = Path(output)
    if path.is_dir() or not path.suffix:
        return "lm-eval"
    if path.suffix.lower() not in SUFFIXES:
        raise ResultsError(
            f"-o {output!r}: {path.suffix!r} is no format of a report: end it on .html, .md, "
            f".csv or .tex, give a folder for lm-eval's files, or choose with --format."
        )
    return SUFFIXES[path.suffix.lower()]


def _write_lm_eval(found: Sequence[Section], folder: Path) -> None:
    from ..report.lm_eval import write

    try:
        written = write(found, folder)
    except OSError as error:
        raise _unwritable(str(folder), error) from error
    for cell, reason in written.without_samples:
        sys.stderr.write(f"no samples of {cell.name}: {reason}\n")
    for cell in written.left_out:
        sys.stderr.write(f"left out, {cell.record['status']}: {cell.name}\n")
    sys.stderr.write(f"lm-eval files of {_counted(found)}: {len(written.files)} in {folder}\n")


def _unwritable(output: str, error: OSError) -> ResultsError:
    return ResultsError(
        f"-o {output!r} cannot be written ({error.strerror}): choose another place."
    )


def _counted(found: Sequence[Section]) -> str:
    cells = sum(len(section.cells) for section in found)
    return f"{cells} cell{'s' * (cells != 1)}"
