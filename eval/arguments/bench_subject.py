"""What benches that run a model ask alike: methods and budgets, model, sizes, device."""

from __future__ import annotations

import argparse
import math

from ...prune.errors import MethodFieldError
from .shared import DEFAULT_BUDGETS, grid_arguments, positive

METHODS = ("divprune", "vtc_cls", "fastv")
"""What is measured unless others are given."""


def add_words(parser: argparse.ArgumentParser) -> None:
    """--methods and --budgets."""
    grid_arguments(parser, METHODS, DEFAULT_BUDGETS, "names")


def add_model(parser: argparse.ArgumentParser) -> None:
    """--shape or --model; or a LLaVA of --layers, --width and --tokens."""
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


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, --dtype and --attn_implementation."""
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


def refuse_sizes(tokens: int, width: int) -> None:
    """
    Raises:
        MethodFieldError: sizes that no model has.
    """
    if math.isqrt(tokens) ** 2 != tokens or width % 64:
        raise MethodFieldError(
            f"--tokens {tokens} must be a square (e.g. 576) and --width {width} a multiple of 64."
        )


def picture(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH."""
    height, _, width = text.partition("x")
    try:
        return positive(height), positive(width)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a height and a width in pixels: write e.g. 672x672"
        ) from None
