"""`vlmprune bench serve`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ...prune.errors import MethodFieldError
from ..words.typed import split_list
from .bench_subject import METHODS, add_device, add_model, add_words, picture, refuse_sizes
from .shared import import_argument, positive, positives

TRANSFORMERS, VLLM = "transformers", "vllm"
_SERVED = ["divprune", "vtc_cls"]
"""Of the methods that are measured unless others are given, those that vLLM can run."""
HELP = "requests a second and waiting times under load, dense beside pruned"
EXAMPLES = None


@dataclass(frozen=True, kw_only=True)
class BenchServeRequest:
    """A model under load, dense and with methods.

    Attributes:
        engine: what answers: `transformers`, in this process, or `vllm`, in servers that are
            started in the environment that the command runs in.
        engine_args: further flags of `vllm serve`, as typed.
        methods, budgets: words as on the command line.
        shapes: names of published sizes, each of which is measured; or `model`, a checkpoint; or
            else a LLaVA of so many `layers`, `width` and visual `tokens`.
        picture: height and width in pixels; None: what is usual for the model.
        concurrency: so many clients ask at once, each anew when it is answered.
        requests: of each client in a round.
        new_tokens: of each answer, no more and no less.

    Raises:
        MethodFieldError: sizes that no model has.
    """

    engine: str
    engine_args: str
    methods: Sequence[str]
    budgets: Sequence[str]
    shapes: Sequence[str]
    model: str | None
    picture: tuple[int, int] | None
    layers: int
    width: int
    tokens: int
    concurrency: Sequence[int]
    requests: int
    repeats: int
    new_tokens: int
    device: str | None
    dtype: str
    attn_implementation: str
    output_path: str | None

    def __post_init__(self) -> None:
        refuse_sizes(self.tokens, self.width)
        if self.engine_args and self.engine != VLLM:
            raise MethodFieldError("--engine_args are flags of vLLM: add --engine vllm.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=(TRANSFORMERS, VLLM),
        default=TRANSFORMERS,
        help="what answers: a patched model in this process, or servers of vLLM, which are started "
        f"where vLLM is installed, one for dense and each method; methods there by default: "
        f"{','.join(_SERVED)} (default: {TRANSFORMERS})",
    )
    parser.add_argument(
        "--engine_args",
        default="",
        metavar="FLAGS",
        help="further flags of `vllm serve`: --engine_args='--tensor-parallel-size 2'",
    )
    add_words(parser)
    add_model(parser)
    parser.add_argument(
        "--picture",
        type=picture,
        metavar="HxW",
        help="its height and width in pixels (default: what is usual for the model)",
    )
    parser.add_argument(
        "--concurrency",
        type=positives,
        default=[1, 4, 16, 32],
        metavar="N,...",
        help="clients that ask at once, in a thread each (default: 1,4,16,32)",
    )
    parser.add_argument(
        "--requests",
        type=positive,
        default=2,
        metavar="N",
        help="of each client in a round (default: 2)",
    )
    parser.add_argument(
        "--repeats", type=positive, default=3, help="rounds, dense first in each (default: 3)"
    )
    parser.add_argument(
        "--new_tokens", type=positive, default=16, metavar="N", help="of each answer (default: 16)"
    )
    add_device(parser)
    parser.add_argument(
        "--output_path", "-o", metavar="FILE", help="also write the numbers as JSON"
    )
    import_argument(parser)


def request(args: argparse.Namespace) -> BenchServeRequest:
    """The request; what is wrong at first sight is refused.

    Raises:
        VlmpruneError: an error says what is allowed.
    """
    from . import early

    methods, budgets = split_list(args.methods), split_list(args.budgets)
    if args.engine == VLLM and methods == list(METHODS):
        methods = _SERVED
    early.refuse_unknown_methods(methods)
    early.refuse_unknown_budgets(budgets)
    same = {field.name: getattr(args, field.name) for field in fields(BenchServeRequest)}
    shapes = split_list(args.shapes)
    return BenchServeRequest(**same | {"methods": methods, "budgets": budgets, "shapes": shapes})
