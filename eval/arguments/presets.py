"""`vlmprune presets`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

HELP = "list the presets of `sweep` and `classify`, and their published numbers"
EXAMPLES = None


@dataclass(frozen=True)
class PresetsRequest:
    """`name`: the one to tell all about; None: a list of all."""

    name: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="show the numbers that this one holds"
    )


def request(args: argparse.Namespace) -> PresetsRequest:
    return PresetsRequest(args.name)
