"""`vlmprune check-method`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from ..words.typed import split_list
from .shared import import_argument

HELP = "run a method on tiny models of all layouts and say what it breaks"
EXAMPLES = """\
examples:
  vlmprune check-method fastv:layer=1
  vlmprune check-method ./mine.py
      every method that the file registers
  vlmprune check-method mine --import ./mine.py --layouts llava_next

Exit code: 0, or 1 if something FAILs.
"""


@dataclass(frozen=True)
class CheckRequest:
    """`method`: a name with or without fields, or a file that registers some; `layouts`: some of
    them, empty for all."""

    method: str
    layouts: Sequence[str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        help="name or name:field=value of a method, or a file (mine.py) that registers some",
    )
    parser.add_argument(
        "--layouts", nargs="+", default=[], metavar="LAYOUT", help="some of them (default: all)"
    )
    import_argument(parser)


def request(args: argparse.Namespace) -> CheckRequest:
    return CheckRequest(args.name, split_list(args.layouts))
