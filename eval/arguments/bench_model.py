"""`vlmprune bench model`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from ...prune.errors import MethodFieldError
from ..words.typed import split_list
from .shared import BUDGET_WORD, DEFAULT_BUDGETS, METHOD_WORD, import_argument, positive

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
        if math.isqrt(self.tokens) ** 2 != self.tokens or self.width % 64:
            raise MethodFieldError(
                f"--tokens {self.tokens} must be a square (e.g. 576) and --width {self.width} a "
                f"multiple of 64."
            )
        if self.ragged and (self.batch_size == 1 or self.image is not None):
            raise MethodFieldError(
                "--ragged pads prompts of one batch to the longest: give --batch_size 2 or more, "
                "and no --image."
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["divprune", "vtc_cls", "fastv"],
        metavar="NAME",
        help=f"{METHOD_WORD} (default: divprune,vtc_cls,fastv)",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=list(DEFAULT_BUDGETS),
        metavar="BUDGET",
        help=f"{BUDGET_WORD} (default: {','.join(DEFAULT_BUDGETS)})",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shape",
        dest="shapes",
        nargs="+",
        default=[],
        metavar="NAME",
        help="sizes of published models with random weights, or small ones of their families: "
        "llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-onevision-7b, qwen2.5-vl-7b, "
        "qwen3-vl-8b, llava-small, llava-next-small, llava-onevision-small, qwen2.5-vl-small, "
        "qwen3-vl-small; llava-1.5-encoder, qwen2.5-vl-encoder: the published encoder in front of "
        "two layers (default: a LLaVA of --layers, --width and --tokens)",
    )
    which.add_argument("--model", metavar="DIR_OR_NAME", help="a checkpoint instead")
    parser.add_argument(
        "--picture",
        dest="pictures",
        nargs="+",
        default=[],
        type=_picture,
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
    parser.add_argument("--layers", type=positive, default=12, help="of the decoder (default: 12)")
    parser.add_argument(
        "--width",
        type=positive,
        default=1024,
        help="of the decoder, a multiple of 64 (default: 1024)",
    )
    parser.add_argument(
        "--tokens", type=positive, default=576, help="visual tokens, a square (default: 576)"
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
    parser.add_argument("--device", help="cpu, cuda (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on the CPU, else bfloat16, also where nothing is run (default: auto)",
    )
    parser.add_argument(
        "--attn_implementation", default="sdpa", metavar="NAME", help="default: sdpa"
    )
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


def _picture(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        return positive(height), positive(width)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a height and a width in pixels: write e.g. 672x672"
        ) from None
