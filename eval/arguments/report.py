"""`vlmprune report`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from .shared import positive

HELP = "show the results of sweeps, e.g. as a page"
EXAMPLES = """\
examples:
  vlmprune report ./vlmprune_runs -o report.html
      one page that opens offline: frontier, tables, pictures of the kept tokens, configurations
  vlmprune report a/runs.jsonl b/runs.jsonl -o report.md
  vlmprune report ./vlmprune_runs -o numbers.csv
  vlmprune report ./vlmprune_runs -o report.html --hard
      also how methods do on the questions that smaller pictures (downsample) fail at equal tokens
  vlmprune report ./vlmprune_runs -o table.tex
      for a paper: \\input{table.tex}, with \\usepackage{booktabs}
  vlmprune report ./vlmprune_runs -o ./lm_eval_results
      a folder: results_*.json and samples_*.jsonl as lm-eval writes them
"""


@dataclass(frozen=True, kw_only=True)
class ReportRequest:
    """Result files, and what becomes of them.

    Attributes:
        runs: files, or folders that hold a `runs.jsonl`.
        output: a file, or a folder for lm-eval's; None for stdout.
        format: in place of the one that `output` ends on.
        examples: questions with pictures of every task; None for all.
        hard: also scores on the questions that `downsample` fails.
    """

    runs: Sequence[str]
    output: str | None = None
    format: str | None = None
    examples: int | None = None
    hard: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", help="files runs.jsonl, or the folders they are in"
    )
    parser.add_argument(
        "--output_path",
        "-o",
        metavar="OUT",
        help="ends on .html, .md, .csv or .tex; a folder for lm-eval's files (default: Markdown to "
        "stdout)",
    )
    parser.add_argument(
        "--format",
        choices=("html", "markdown", "csv", "latex", "lm-eval"),
        help="whatever OUT ends on",
    )
    parser.add_argument(
        "--examples",
        type=_count,
        metavar="N",
        help="questions of every task that are shown, with pictures (default: all recorded)",
    )
    parser.add_argument(
        "--hard",
        action="store_true",
        help="also scores on the questions that downsample answers wrong at equal tokens (pages, "
        "Markdown, CSV)",
    )


def request(args: argparse.Namespace) -> ReportRequest:
    return ReportRequest(
        runs=args.runs,
        output=args.output_path,
        format=args.format,
        examples=args.examples,
        hard=args.hard,
    )


def _count(text: str) -> int:
    return 0 if text == "0" else positive(text)
