"""`vlmprune new-method`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Literal

Where = Literal["encoder", "before_llm", "decoder", "cache"]

HELP = "write a file with a new method"
EXAMPLES = """\
examples:
  vlmprune new-method mine --place before_llm
      writes ./mine.py, a method that works: change its rule, then
  vlmprune check-method ./mine.py
  vlmprune sweep --import ./mine.py --methods mine,divprune --budgets 0.25
"""


@dataclass(frozen=True)
class NewRequest:
    """A method `name` that acts at `place`, written to a file (None: of its name)."""

    name: str
    place: Where
    output_path: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the method, in lower case: my_method")
    parser.add_argument(
        "--place",
        required=True,
        choices=("encoder", "before_llm", "decoder", "cache"),
        help="where it acts: in the vision encoder, before the LLM, between decoder layers, on the "
        "KV cache",
    )
    parser.add_argument(
        "--output_path", "-o", metavar="FILE", help="a file that is not there (default: NAME.py)"
    )


def request(args: argparse.Namespace) -> NewRequest:
    return NewRequest(args.name, args.place, args.output_path)
