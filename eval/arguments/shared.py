"""Arguments that several verbs have, the types of their values, and what help says of words."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from ...prune.amount import BUDGET_WORDS
from ..words.typed import split_list

DEFAULT_BUDGETS = ("published", "0.5", "0.25", "0.11")

METHOD_WORD = (
    "name:field=value sets a field of a method, name@budget gives it a budget of its own, and "
    "name+name runs several, e.g. divprune@0.5+fastv:layer=3"
)
BUDGET_WORD = (
    "0.25: ratio kept; 64: tokens kept; avg:64: mean tokens per layer; flops:0.3: share of dense "
    "FLOPs; published: the method's own schedule or rule, where it has one"
)


class OneLineParser(argparse.ArgumentParser):
    """Errors of usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


# --- Arguments -------------------------------------------------------------------------------


def verbosity_argument(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--verbosity",
        type=str.upper,
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default=default,
        help="log level on stderr; DEBUG shows tracebacks (default: WARNING)",
    )


def import_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--import",
        dest="imports",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files (mine.py) or installed modules that register methods of your own",
    )


def positions_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--positions",
        choices=("original", "repacked"),
        help="rotary positions after a cut (default: the one of each method's paper)",
    )


def grid_arguments(
    parser: argparse._ActionsContainer, methods: Sequence[str], budgets: Sequence[str], names: str
) -> None:
    """`--methods` and `--budgets` with their defaults; `names`: what help says of methods first."""
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(methods),
        metavar="NAME",
        help=f"{names}; {METHOD_WORD}; dense is always run, first (default: {','.join(methods)})",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=list(budgets),
        metavar="BUDGET",
        help=f"for methods without one of their own; {BUDGET_WORD} (default: {','.join(budgets)})",
    )


def budget_arguments(group: argparse._ArgumentGroup) -> argparse._MutuallyExclusiveGroup:
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--keep_ratio", type=float, metavar="X", help="share of the tokens kept")
    budget.add_argument("--keep_tokens", type=int, metavar="N", help="tokens kept per image")
    budget.add_argument("--average_tokens", type=float, metavar="N", help="mean per decoder layer")
    budget.add_argument("--flops_ratio", type=float, metavar="X", help="share of dense FLOPs")
    return budget


def batch_arguments(parser: argparse._ActionsContainer) -> None:
    """How many are asked at once, and by which chance."""
    parser.add_argument("--batch_size", "-b", type=positive, default=32, help="default: 32")
    parser.add_argument(
        "--seed", type=int, default=0, help="of torch and of every method that has one (default: 0)"
    )


def folder_arguments(parser: argparse._ActionsContainer, what: str) -> None:
    """Where results are kept, and which.

    Args:
        what: stands in the folder beside runs.jsonl, for the help.
    """
    parser.add_argument(
        "--output_path",
        "-o",
        default="./vlmprune_runs",
        metavar="DIR",
        help=f"for runs.jsonl, {what} (default: ./vlmprune_runs)",
    )
    parser.add_argument(
        "--log_samples", "-s", action="store_true", help="also write every answer to samples/"
    )
    parser.add_argument(
        "--rerun", action="store_true", help="measure again what the folder has already"
    )


def answer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", metavar="FILE", help="write the picture of the kept tokens here")
    parser.add_argument("--max_new_tokens", type=positive, default=32, help="default: 32")


def given_budget(args: argparse.Namespace) -> dict[str, float]:
    """The budget of `budget_arguments`, by its word; empty if none was typed."""
    return {word: value for word in BUDGET_WORDS if (value := getattr(args, word)) is not None}


# --- Values ----------------------------------------------------------------------------------


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def positives(text: str) -> list[int]:
    return [positive(word) for word in split_list([text])]
