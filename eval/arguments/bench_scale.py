"""`vlmprune bench scale`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from ..words.typed import split_list
from .shared import import_argument, positive, positives

HELP = "how time and memory of choosing grow with the number of visual tokens"
EXAMPLES = None


@dataclass(frozen=True, kw_only=True)
class BenchScaleRequest:
    """Methods, and the sizes at which choosing is measured.

    Attributes:
        methods: names; empty: all.
        tokens: visual tokens of an image.
        rounds: after one that warms up.
        limit: seconds; sizes of which a round is expected to take longer are left out.
    """

    methods: Sequence[str]
    tokens: Sequence[int]
    rounds: int
    limit: float
    output_path: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="NAME",
        help="default: all but those inside the vision encoder",
    )
    parser.add_argument(
        "--tokens",
        type=positives,
        default=[256, 1024, 4096, 16384],
        metavar="N,...",
        help="visual tokens, squares (default: 256,1024,4096,16384)",
    )
    parser.add_argument(
        "--rounds",
        type=positive,
        default=3,
        help="after one that warms up; a round of more than 3 s is measured once (default: 3)",
    )
    parser.add_argument(
        "--limit",
        type=positive,
        default=60,
        metavar="SECONDS",
        help="leave out sizes of which one round is expected to take longer (default: 60)",
    )
    parser.add_argument(
        "--output_path", "-o", metavar="FILE", help="also write the numbers as JSON"
    )
    import_argument(parser)


def request(args: argparse.Namespace) -> BenchScaleRequest:
    from . import early

    methods = split_list(args.methods)
    early.refuse_unknown_methods(methods)
    return BenchScaleRequest(
        methods=methods,
        tokens=args.tokens,
        rounds=args.rounds,
        limit=args.limit,
        output_path=args.output_path,
    )
