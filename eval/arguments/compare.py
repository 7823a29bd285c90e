"""`vlmprune compare`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..models.request import ModelRequest
from ..words.typed import DOWNSAMPLE, split_list
from .model import model_arguments, model_request
from .shared import (
    BUDGET_WORD,
    METHOD_WORD,
    answer_arguments,
    budget_arguments,
    given_budget,
    import_argument,
    positions_argument,
    positive,
)

if TYPE_CHECKING:
    from ...prune.contract import Positions
    from ..tasks.protocols import Question

HELP = "ask one question with several methods, side by side"
EXAMPLES = """\
examples:
  vlmprune compare embedded:18 --methods divprune,fastv,vtc_cls --keep_ratio 0.2 --save all.png
      one picture of all: what each kept, and what it said to it
  vlmprune compare embedded:24 embedded:31 --methods divprune --budgets 0.5,0.25,0.11
  vlmprune compare cat.jpg dog.jpg "What is it doing?" --methods divprune,fastv:layer=3@0.5 \\
      --keep_tokens 64 --model llava-hf/llava-1.5-7b-hf --save all.png
      the same question about two pictures
  vlmprune compare cat.jpg "What color is it?" --methods divprune@0.5+fastv,pyramiddrop@published \\
      --keep_ratio 0.2 --answer black
"""


@dataclass(frozen=True, kw_only=True)
class CompareRequest:
    """One question about each of several pictures, and the methods that answer it.

    Attributes:
        asked: the question about each picture, by what was typed for the picture.
        methods: words as on the command line.
        budget: at most one, for methods without one of their own; or `budgets`, several.
        save: where the picture of the kept tokens goes.
        repeats: times that each is timed.
    """

    asked: Mapping[str, Question]
    methods: Sequence[str]
    budget: Mapping[str, float]
    budgets: Sequence[str]
    positions: Positions | None
    save: str | None
    max_new_tokens: int
    repeats: int
    model: ModelRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s IMAGE [IMAGE ...] QUESTION --methods NAME [NAME ...] [options]"
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="pictures, each of which is asked about, or embedded:N for one of the embedded "
        "benchmark; behind them the QUESTION, which may be left out with embedded:N",
    )
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--methods",
        required=True,
        nargs="+",
        metavar="NAME",
        help=f"names, with commas or spaces; {METHOD_WORD}; dense is always asked, first",
    )
    budget = budget_arguments(group)
    budget.add_argument(
        "--budgets", nargs="+", default=[], metavar="BUDGET", help=f"several; {BUDGET_WORD}"
    )
    import_argument(group)
    positions_argument(group)
    parser.add_argument(
        "--answer", default="", metavar="TEXT", help="the right one: answers become green or red"
    )
    parser.add_argument(
        "--repeats", type=positive, default=3, help="times that each is timed (default: 3)"
    )
    answer_arguments(parser)
    model_arguments(parser)


def request(args: argparse.Namespace) -> CompareRequest:
    """The request; what is wrong at first sight is refused.

    Raises:
        VlmpruneError: an error says what is allowed.
    """
    from ..compare import asked
    from . import early

    methods, budgets = split_list(args.methods), split_list(args.budgets)
    early.refuse_unknown_methods(methods, others=[DOWNSAMPLE])
    early.refuse_unknown_budgets(budgets)
    asked.check_save(args.save)
    return CompareRequest(
        asked=asked.read_all_asked(args.images, args.answer),
        methods=methods,
        budget=given_budget(args),
        budgets=budgets,
        positions=args.positions,
        save=args.save,
        max_new_tokens=args.max_new_tokens,
        repeats=args.repeats,
        model=model_request(args),
    )
