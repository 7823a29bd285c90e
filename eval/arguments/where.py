"""`vlmprune where`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

HELP = "print where the embedded model and benchmark are"
EXAMPLES = None


@dataclass(frozen=True)
class WhereRequest:
    """`what`: one of the choices of the argument."""

    what: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=("model", "data", "tasks", "task-name", "words"),
        help="folders of the embedded model, of its data, of our tasks for lmms-eval's "
        "--include_path; or the name of the embedded benchmark among these tasks, or the words "
        "that the embedded model knows",
    )


def request(args: argparse.Namespace) -> WhereRequest:
    return WhereRequest(args.what)
