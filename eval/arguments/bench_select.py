"""`vlmprune bench select`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

from ..words.typed import split_list
from .shared import import_argument, positive, positives

HELP = "choosing alone, beside a plain transcription of each method's official steps"
EXAMPLES = None


@dataclass(frozen=True, kw_only=True)
class BenchSelectRequest:
    """Methods before the LLM, and the sizes at which their choice is timed.

    Attributes:
        methods: names; empty: all before the LLM.
        tokens: visual tokens of an image.
        batches: images at once.
        rounds: after one that warms up.
        threads: of torch; None: as many as it has.
        width: of the LLM's features.
    """

    methods: Sequence[str]
    tokens: Sequence[int]
    batches: Sequence[int]
    rounds: int
    threads: int | None
    width: int
    output_path: str | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods", nargs="+", default=[], metavar="NAME", help="default: all before the LLM"
    )
    parser.add_argument(
        "--tokens",
        type=positives,
        default=[576, 2880],
        metavar="N,...",
        help="visual tokens of an image, tiles of 576 (default: 576,2880)",
    )
    parser.add_argument(
        "--batch", type=positives, default=[1, 8], metavar="N,...", help="images (default: 1,8)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=5, help="after one that warms up (default: 5)"
    )
    parser.add_argument("--threads", type=positive, help="of torch (default: torch's)")
    parser.add_argument(
        "--width", type=positive, default=4096, help="of the LLM's features (default: 4096)"
    )
    parser.add_argument(
        "--output_path", "-o", metavar="FILE", help="also write the numbers as JSON"
    )
    import_argument(parser)


def request(args: argparse.Namespace) -> BenchSelectRequest:
    from . import early

    methods = split_list(args.methods)
    early.refuse_unknown_methods(methods)
    return BenchSelectRequest(
        methods=methods,
        tokens=args.tokens,
        batches=args.batch,
        rounds=args.rounds,
        threads=args.threads,
        width=args.width,
        output_path=args.output_path,
    )
