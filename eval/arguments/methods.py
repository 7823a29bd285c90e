"""`vlmprune methods`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from .shared import import_argument

HELP = "list the pruning methods, or tell all about one"
EXAMPLES = """\
examples:
  vlmprune methods
  vlmprune methods fastv
      its paper and official code, what differs from it, fields, budgets, and models that it runs on
"""


@dataclass(frozen=True)
class MethodsRequest:
    """`name`: the one to tell all about; None: a list of all."""

    name: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="what it does, reads and takes, and where it runs"
    )
    import_argument(parser)


def request(args: argparse.Namespace) -> MethodsRequest:
    from . import early

    early.refuse_unknown_methods([args.name] if args.name else [])
    return MethodsRequest(args.name)
