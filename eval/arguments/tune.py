"""`vlmprune tune`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..sweep.request import SweepRequest
from ..words.typed import DOWNSAMPLE, split_list
from .model import model_arguments, model_request
from .shared import BUDGET_WORD, METHOD_WORD, import_argument, positions_argument, positive

HELP = "find the method and budget that reach a target on a model and its questions"
EXAMPLES = """\
examples:
  vlmprune tune --target tokens=49
      the best answers of the embedded model with 49 visual tokens a decoder layer
  vlmprune tune --target accuracy=-1.0 --minutes 20
      the fewest FLOPs at a loss of one point
  vlmprune tune --model llava-hf/llava-1.5-7b-hf --data my.jsonl --target latency=0.6
      the best answers in 60 % of the time to the first token

All candidates answer a few questions, the better half twice as many, and so on. What was measured
is in the folder, as of a sweep (`vlmprune report` shows it): the same command goes on where it
stopped. Exit code: 0, or 1 if nothing meets the target.
"""
METHODS = (
    *("random", "grid", DOWNSAMPLE, "divprune", "vtc_cls", "vispruner", "scope", "visionzip"),
    *("cdpruner:relevance=prompt", "fastv", "dart", "sparsevlm"),
)
BUDGETS = ("0.5", "0.33", "0.22", "0.11")


@dataclass(frozen=True, kw_only=True)
class TuneRequest:
    """A search.

    Attributes:
        target: as typed.
        minutes: of this call.
        sweep: candidates, questions (`limit`: of the last round) and model.
    """

    target: str
    minutes: float
    sweep: SweepRequest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        required=True,
        metavar="WORD=NUMBER",
        help="tokens=64: at most so many visual tokens a decoder layer; latency=0.6: at most this "
        "share of dense's time to the first token; accuracy=-1.0: at most so many points lost",
    )
    parser.add_argument(
        "--minutes", type=_minutes, default=30.0, metavar="N", help="time to search (default: 30)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="NAME",
        help=f"candidates, with commas or spaces; {METHOD_WORD} (default: {','.join(METHODS)})",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        metavar="BUDGET",
        help=f"of candidates without one of their own; {BUDGET_WORD} (default: "
        f"{','.join(BUDGETS)}; of a target of tokens these, as a mean)",
    )
    import_argument(parser)
    positions_argument(parser)
    parser.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="one, as of sweep (default: tinyscenes)",
    )
    parser.add_argument(
        "--data", metavar="FILE", help="your own questions instead, as of sweep: JSON lines"
    )
    parser.add_argument(
        "--matching", choices=("exact", "contains", "number", "choice"), default="exact"
    )
    parser.add_argument("--max_new_tokens", type=positive, default=32, metavar="N")
    parser.add_argument(
        "--limit", type=positive, default=512, metavar="N", help="questions at most (default: 512)"
    )
    parser.add_argument("--batch_size", "-b", type=positive, default=32, help="default: 32")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--output_path",
        "-o",
        default="./vlmprune_tune",
        metavar="DIR",
        help="for runs.jsonl and tune.md (default: ./vlmprune_tune)",
    )
    model_arguments(parser)


def request(args: argparse.Namespace) -> TuneRequest:
    """The request; what is wrong at first sight is refused.

    Raises:
        VlmpruneError: an error says what is allowed.
    """
    from ..tasks.jsonl import read_all
    from ..tune.target import Target, TargetError
    from . import early

    target = Target.parse(args.target)
    methods, tasks = split_list(args.methods), split_list(args.tasks)
    budgets = split_list(args.budgets or _budgets(target.word, target.value))
    early.refuse_unknown_methods(methods, others=[DOWNSAMPLE])
    early.refuse_unknown_budgets(budgets)
    early.refuse_unknown_questions(tasks, (), model=args.model, other_tasks=bool(args.data))
    early.refuse_unwritable(args.output_path)
    if len(tasks) + bool(args.data) > 1:
        raise TargetError("tune searches on one task: give one of --tasks, or --data FILE.")
    own = read_all(
        [args.data] if args.data else [],
        matching=args.matching,
        max_new_tokens=args.max_new_tokens,
    )
    return TuneRequest(
        target=args.target,
        minutes=args.minutes,
        sweep=SweepRequest(
            methods=methods,
            budgets=budgets,
            positions=args.positions,
            limit=args.limit,
            batch_size=args.batch_size,
            seed=args.seed,
            output_path=Path(args.output_path),
            model=model_request(args),
            tasks=tasks,
            own=own,
            settings={"imports": args.imports},
        ),
    )


def _budgets(word: str, value: float) -> Sequence[str]:
    return [f"avg:{value:g}"] if word == "tokens" else BUDGETS


def _minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of minutes above 0")
    return value
