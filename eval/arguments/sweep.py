"""`vlmprune sweep`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...prune.errors import MethodFieldError
from ..sweep.request import SweepRequest
from ..words.typed import DOWNSAMPLE, split_list
from .model import model_arguments, model_request
from .shared import (
    DEFAULT_BUDGETS,
    OneLineParser,
    batch_arguments,
    folder_arguments,
    grid_arguments,
    import_argument,
    positions_argument,
    positive,
    verbosity_argument,
)

HELP = "evaluate a grid of methods x budgets"
EXAMPLES = """\
examples:
  vlmprune sweep
      the embedded model and benchmark: a table, ./vlmprune_runs/runs.jsonl and frontier.png
  vlmprune sweep --methods divprune,vtc_cls --budgets 0.5,64,avg:48 --limit all
  vlmprune sweep --methods fastv:layer=3 fastv:layer=1 --budgets 0.25 -o ./layers
  vlmprune sweep --methods divprune@0.5+fastv --budgets 0.25,0.11
      two methods at once, the first with a budget of its own; every budget is a share of the
      tokens that the image had at first
  vlmprune sweep --depths 1,2,3,4,5 --methods fastv,random_decoder --budgets 49
      cuts in front of each of these decoder layers, beside a choice by chance at the same depth
  vlmprune sweep --tasks tinyscenes-turns --methods divprune,fastv,random --budgets 49,22
      the second of two questions about a picture, on the tokens that the first one left
  vlmprune sweep --kinds read --limit all
      only questions of this kind, whose answers have two or three words
  vlmprune sweep --data my.jsonl --matching contains --model Qwen/Qwen2.5-VL-7B-Instruct
      your own questions, one JSON object a line:
      {"image": "a.jpg", "question": "What is it?", "answer": "a cat", "kind": "animals"}
      {"image": "b.jpg", "question": "Where?", "choices": ["in", "out"], "answer": "A"}
  vlmprune sweep --model llava-hf/llava-1.5-7b-hf --tasks gqa,pope --device cuda --batch_size 16
  vlmprune sweep --preset llava-1.5 --methods divprune,fastv --device cuda -o llava
      the literature's budgets and tasks for a model, with methods of your choice
  vlmprune sweep --config vlmprune_runs/sweep.yaml --limit all
      an earlier sweep again, with another number of questions
  torchrun --nproc_per_node 2 -m vlmprune sweep --limit 100
      two processes share the questions

Interrupt it when you like: the same command goes on where it stopped. The table and the picture
show every cell in the folder with the same model, questions and seed, so that a later call with
other methods or budgets adds to them. Exit code: 0, or 1 if a cell failed.
"""
DEFAULT_METHODS = ("random", "grid", DOWNSAMPLE, "divprune", "vtc_cls", "hiprune", "fastv")


def sweep_parser() -> argparse.ArgumentParser:
    """The arguments of the sweep command alone."""
    parser = OneLineParser(prog="vlmprune sweep")
    verbosity_argument(parser, "WARNING")
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings given elsewhere; flags typed here go before them")
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="a grid of the literature, whole or in part: see `vlmprune presets`",
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        help="YAML with flags as keys; goes before the preset. A sweep writes its own as "
        "sweep.yaml into its folder",
    )
    group = parser.add_argument_group("grid")
    grid_arguments(group, DEFAULT_METHODS, DEFAULT_BUDGETS, "names, with commas or spaces")
    group.add_argument(
        "--depths",
        nargs="+",
        default=[],
        metavar="LAYER",
        help="methods in the decoder with a field `layer` run once for each of these, the first "
        "layer that sees fewer tokens (-1: the last); name random_decoder beside them",
    )
    import_argument(group)
    positions_argument(group)
    group = parser.add_argument_group("evaluation")
    _question_arguments(group)
    batch_arguments(group)
    folder_arguments(group, "tables and pictures")
    model_arguments(parser)


def _question_arguments(group: argparse._ArgumentGroup) -> None:
    """What is asked."""
    group.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="with commas or spaces: tinyscenes, the embedded benchmark, tinyscenes-turns, where "
        "another question about the picture comes first, tinyscenes-where, which --model "
        "embedded-where answers with a place, or any task of lmms-eval (default: tinyscenes)",
    )
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="your own questions instead: JSON lines with image (a path, relative to the file), "
        "question, answer or answers, and if you like choices, kind, matching, id",
    )
    group.add_argument(
        "--matching",
        choices=("exact", "contains", "number", "choice"),
        default="exact",
        help="how answers to --data are compared, where a line does not say: exact, but for case, "
        "spaces and punctuation; contains: the answer's words stand in what was said; number: the "
        "first number, rounded to the answer's decimals; choice: an option's letter or text "
        "(default: exact, and choice for lines with choices)",
    )
    group.add_argument(
        "--max_new_tokens",
        type=positive,
        default=32,
        metavar="N",
        help="length of answers to --data at most (default: 32)",
    )
    group.add_argument(
        "--include_path", metavar="DIR", help="a folder with further tasks of lmms-eval"
    )
    group.add_argument(
        "--limit",
        type=_limit,
        default=500,
        metavar="N|all",
        help="questions, every kind represented (default: 500; all of --data)",
    )
    group.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help="only questions of these kinds, with commas or spaces (default: all kinds)",
    )


def set_elsewhere(args: argparse.Namespace) -> dict[str, Any]:
    """What a configuration file, a preset or files of questions put in the place of defaults.

    Raises:
        ConfigError, UnknownPresetError: each says what is allowed.
    """
    if not (args.config or args.preset or args.data):
        return {}
    from .config import layered

    return layered(sweep_parser(), config=args.config, preset_name=args.preset, data=args.data)


def request(args: argparse.Namespace) -> SweepRequest:
    """The request; what is wrong at first sight is refused.

    Raises:
        VlmpruneError: an error says what is allowed.
    """
    from ..tasks.jsonl import read_all
    from . import early
    from .config import resolved

    methods, budgets = split_list(args.methods), split_list(args.budgets)
    tasks, kinds = split_list(args.tasks), split_list(args.kinds or [])
    early.refuse_unknown_methods(methods, others=[DOWNSAMPLE])
    early.refuse_unknown_budgets(budgets)
    early.refuse_unknown_questions(tasks, kinds, model=args.model, other_tasks=bool(args.data))
    early.refuse_unwritable(args.output_path)
    return SweepRequest(
        methods=methods,
        budgets=budgets,
        depths=_layers(args.depths),
        positions=args.positions,
        limit=args.limit,
        kinds=kinds,
        batch_size=args.batch_size,
        seed=args.seed,
        output_path=Path(args.output_path),
        log_samples=args.log_samples,
        rerun=args.rerun,
        model=model_request(args),
        tasks=tasks,
        own=read_all(args.data, matching=args.matching, max_new_tokens=args.max_new_tokens),
        include_path=args.include_path,
        settings=resolved(sweep_parser(), args),
    )


def _layers(words: Sequence[str]) -> list[int]:
    """Numbers of layers as typed.

    Raises:
        MethodFieldError: one is no whole number.
    """
    layers = []
    for word in split_list([str(word) for word in words]):
        try:
            layers.append(int(word))
        except ValueError:
            raise MethodFieldError(
                f"--depths {word}: give numbers of decoder layers, e.g. --depths 2,8,16."
            ) from None
    return layers


def _limit(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of questions (at least 1) nor all"
        ) from None
