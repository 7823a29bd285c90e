"""`vlmprune bench model`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ...prune.errors import MethodFieldError
from ..words.typed import split_list
from .bench_subject import add_device, add_model, add_words, picture, refuse_sizes
from .shared import import_argument, positive

HELP = "dense, oracle and patched runs of a model, in turn"
EXAMPLES = None


@dataclass(frozen=True, kw_only=True)
class BenchModelRequest:
    """One model, and the variants that are timed on it.

    Attributes:
        methods, budgets: words as on the command line.
        shapes: names of published sizes, each of which is measured; or `model`, a checkpoint; or
            else a LLaVA of so many `layers`, `width` and visual `tokens`.
        pictures: heights and widths in pixels, each of which is measured; none: what is usual for
            the model.
        image: a file in their place.
        ragged: whether prompts differ in length.
        meta: run nothing, reckon from sizes alone.
        memory: whether peak memory is measured on the CPU as well.

    Raises:
        MethodFieldError: sizes that no model has, or a batch that cannot be ragged.
    """

    methods: Sequence[str]
    budgets: Sequence[str]
    shapes: Sequence[str]
    model: str | None
    pictures: Sequence[tuple[int, int]]
    image: str | None
    layers: int
    width: int
    tokens: int
    batch_size: int
    ragged: bool
    meta: bool
    repeats: int
    new_tokens: int
    memory: bool
    device: str | None
    dtype: str
    attn_implementation: str
    output_path: str | None

    def __post_init__(self) -> None:
        refuse_sizes(self.tokens, self.width)
        if self.ragged and (self.batch_size == 1 or self.image is not None):
            raise MethodFieldError(
                "--ragged pads prompts of one batch to the longest: give --batch_size 2 or more, "
                "and no --image."
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)
    add_model(parser)
    parser.add_argument(
        "--picture",
        dest="pictures",
        nargs="+",
        default=[],
        type=picture,
        metavar="HxW",
        help="its height and width in pixels; several are measured in turn (default: what is usual "
        "for the model)",
    )
    parser.add_argument(
        "--image", metavar="FILE", help="a picture for --model (default: noise of --picture)"
    )
    parser.add_argument(
        "--batch_size", "-b", type=positive, default=1, help="prompts at once (default: 1)"
    )
    parser.add_argument(
        "--ragged",
        action="store_true",
        help="prompts of unequal length, so that all but the longest are padded",
    )
    parser.add_argument(
        "--meta",
        action="store_true",
        help="run nothing: FLOPs and bytes from sizes alone (what happens anyway where a shape "
        "does not fit)",
    )
    parser.add_argument("--repeats", type=positive, default=5, help="rounds (default: 5)")
    parser.add_argument(
        "--new_tokens", type=positive, default=32, metavar="N", help="decoded (default: 32)"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also measure peak memory on the CPU, in a process of its own for every variant "
        "(CUDA's allocator tells without)",
    )
    add_device(parser)
    parser.add_argument(
        "--output_path",
        "-o",
        metavar="FILE",
        help="also write the numbers as JSON, a list where there are several models or pictures",
    )
    import_argument(parser)


def request(args: argparse.Namespace) -> BenchModelRequest:
    """The request; what is wrong at first sight is refused.

    Raises:
        VlmpruneError: an error says what is allowed.
    """
    from . import early

    methods, budgets = split_list(args.methods), split_list(args.budgets)
    shapes = split_list(args.shapes)
    early.refuse_unknown_methods(methods)
    early.refuse_unknown_budgets(budgets)
    same = {field.name: getattr(args, field.name) for field in fields(BenchModelRequest)}
    return BenchModelRequest(**same | {"methods": methods, "budgets": budgets, "shapes": shapes})
