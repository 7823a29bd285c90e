"""`vlmprune vllm-args`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..words.typed import split_list
from .shared import budget_arguments, given_budget

HELP = "print what `vllm serve MODEL --hf-overrides` needs to prune"
EXAMPLES = """\
examples:
  vllm serve MODEL --hf-overrides "$(vlmprune vllm-args MODEL --method divprune --keep_ratio 0.25)"
"""


@dataclass(frozen=True, kw_only=True)
class VllmArgsRequest:
    """A model that vLLM serves, and the method before its LLM.

    Attributes:
        model: a folder or a name on the Hub.
        method_args: fields of the method as they are typed, `field=value`.
        budget: one word of `Budget` and its value.
    """

    model: str
    method: str
    method_args: Sequence[str]
    budget: Mapping[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR_OR_NAME", help="what vLLM is given")
    parser.add_argument(
        "--method",
        required=True,
        metavar="NAME[:FIELD=VALUE]",
        help="one that acts before the LLM, e.g. divprune or cdpruner:relevance=prompt",
    )
    parser.add_argument(
        "--method_args",
        metavar="FIELD=VALUE,...",
        help="fields of the method, e.g. scores=received",
    )
    budget_arguments(parser.add_argument_group("budget"))


def request(args: argparse.Namespace) -> VllmArgsRequest:
    """The request; what is wrong at first sight is refused.

    Raises:
        VlmpruneError: an error says what is allowed.
    """
    from . import early

    name, *fields = args.method.split(":")
    early.refuse_unknown_methods([name])
    return VllmArgsRequest(
        model=args.model,
        method=name,
        method_args=[*fields, *split_list([args.method_args or ""])],
        budget=given_budget(args),
    )
