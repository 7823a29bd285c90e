"""`vlmprune ask`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...prune.errors import MethodFieldError
from ..models.request import ModelRequest
from ..words.typed import DOWNSAMPLE, split_list
from .model import model_arguments, model_request
from .shared import (
    METHOD_WORD,
    answer_arguments,
    budget_arguments,
    given_budget,
    import_argument,
    positions_argument,
)

if TYPE_CHECKING:
    from ...prune.contract import Positions
    from ..tasks.protocols import Question

HELP = "ask one question, dense and pruned, and compare"
EXAMPLES = """\
examples:
  vlmprune ask embedded:24 --method divprune --keep_ratio 0.2 --save overlay.png
      question 24 of the embedded benchmark
  vlmprune ask scene.png "what color is the shirt ?" --method fastv --keep_tokens 40
  vlmprune ask cat.jpg "What is the cat doing?" --model llava-hf/llava-1.5-7b-hf \\
      --method fastv --method_args layer=3 --average_tokens 128
  vlmprune ask embedded:24 --method divprune@0.5+fastv:layer=3@0.25
"""


@dataclass(frozen=True, kw_only=True)
class AskRequest:
    """One question about one picture, and the methods that answer it.

    Attributes:
        asked: the question and its picture.
        methods: words as on the command line.
        method_args: fields of the method, if it is a single one.
        budget: at most one, for methods without one of their own.
        save: where the picture of the kept tokens goes.

    Raises:
        MethodFieldError: fields, and several methods that they may be for.
    """

    asked: Question
    methods: Sequence[str]
    method_args: Sequence[str]
    budget: Mapping[str, float]
    positions: Positions | None
    save: str | None
    max_new_tokens: int
    model: ModelRequest

    def __post_init__(self) -> None:
        if self.method_args and len(self.methods) > 1:
            raise MethodFieldError(
                f"--method_args says not which of {', '.join(self.methods)} it is for: write the "
                f"fields into the word, e.g. fastv:layer=3@0.25."
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", metavar="IMAGE", help="a picture, or embedded:N for one of the embedded benchmark"
    )
    parser.add_argument(
        "question", metavar="QUESTION", nargs="?", help="may be left out with embedded:N"
    )
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--method",
        required=True,
        action="append",
        metavar="NAME",
        help=f"see `vlmprune methods`; {METHOD_WORD}. Given several times: as `vlmprune compare`",
    )
    group.add_argument(
        "--method_args", metavar="FIELD=VALUE,...", help="fields of the method, e.g. layer=3"
    )
    budget_arguments(group)
    import_argument(group)
    positions_argument(group)
    answer_arguments(parser)
    model_arguments(parser)


def request(args: argparse.Namespace) -> AskRequest:
    """The request; what is wrong at first sight is refused.

    Raises:
        VlmpruneError: an error says what is allowed.
    """
    from ..compare import asked
    from . import early

    early.refuse_unknown_methods(split_list(args.method), others=[DOWNSAMPLE])
    asked.check_save(args.save)
    return AskRequest(
        asked=asked.read_asked(args.image, args.question),
        methods=args.method,
        method_args=split_list([args.method_args or ""]),
        budget=given_budget(args),
        positions=args.positions,
        save=args.save,
        max_new_tokens=args.max_new_tokens,
        model=model_request(args),
    )
