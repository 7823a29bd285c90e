"""`vlmprune classify`: its arguments and the request that they become."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..classify.request import ClassifyRequest
from ..words.typed import split_list
from .shared import (
    OneLineParser,
    batch_arguments,
    folder_arguments,
    grid_arguments,
    import_argument,
    positive,
    verbosity_argument,
)

HELP = "run an image classifier on a folder of pictures, dense and with methods inside it"
EXAMPLES = """\
examples:
  vlmprune classify
      the embedded classifier on its own pictures: a table, ./vlmprune_runs/runs.jsonl, frontier.png
  vlmprune classify --model deit_small_patch16_224 --data imagenet/val --methods tome:r=13@published
      needs timm (pip install 'vlmprune[timm]') and fetches the weights
  vlmprune classify --preset deit-s --data imagenet/val -o deit
      the published methods and budgets of DeiT-S; reports show the papers' numbers beside
  vlmprune classify --model ./my-vit --data photos --methods tome,evit --budgets 0.5,0.25
"""
DEFAULT_METHODS = ("tome", "evit", "random_encoder")
DEFAULT_BUDGETS = ("0.5",)


def classify_parser() -> argparse.ArgumentParser:
    """The arguments of the command alone."""
    parser = OneLineParser(prog="vlmprune classify")
    verbosity_argument(parser, "WARNING")
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--preset",
        metavar="NAME",
        help="a grid of the literature, for pictures that --data gives; flags typed here go before "
        "it: see `vlmprune presets`",
    )
    parser.add_argument(
        "--model",
        default="embedded",
        metavar="DIR_OR_NAME",
        help="a name of timm (also hf-hub:... and local-dir:...), a folder that timm or "
        "transformers saved, or a classifier of transformers on the Hub (default: the embedded "
        "classifier)",
    )
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="a folder of pictures for each class: the model's names, or in alphabetical order as "
        "many as it has classes (default: of the embedded classifier its own pictures)",
    )
    grid_arguments(parser, DEFAULT_METHODS, DEFAULT_BUDGETS, "methods inside the encoder")
    import_argument(parser)
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="pictures, every class alike (default: all)"
    )
    batch_arguments(parser)
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16", "float16"),
        help="of weights and pictures (default: float32)",
    )
    folder_arguments(parser, "table and picture")


def set_elsewhere(args: argparse.Namespace) -> dict[str, Any]:
    """What a preset puts in the place of defaults.

    Raises:
        ConfigError, UnknownPresetError: each says what is allowed.
    """
    if not args.preset:
        return {}
    from .config import of_preset

    return of_preset(classify_parser(), args.preset, "classify")


def request(args: argparse.Namespace) -> ClassifyRequest:
    """The request; what is wrong at first sight is refused.

    Raises:
        VlmpruneError: an error says what is allowed.
    """
    from . import early
    from .config import ConfigError

    methods, budgets = split_list(args.methods), split_list(args.budgets)
    early.refuse_unknown_methods(methods)
    early.refuse_unknown_budgets(budgets)
    early.refuse_unwritable(args.output_path)
    data = args.data or ("embedded" if args.model == "embedded" else None)
    if data is None:
        raise ConfigError(
            f"Pictures for {args.model} are missing: give --data FOLDER, with a folder of pictures "
            f"for each class (of ImageNet's validation split n01440764, ...); the model's weights "
            f"are fetched, so that its name needs a network. Without either, leave --model and "
            f"--preset out: the embedded classifier has its own pictures."
        )
    if data != "embedded" and not Path(data).is_dir():
        raise ConfigError(f"--data {data} is no folder: give one with a folder for each class.")
    return ClassifyRequest(
        model=args.model,
        data=data,
        methods=methods,
        budgets=budgets,
        limit=args.limit,
        batch_size=args.batch_size,
        seed=args.seed,
        device=args.device,
        dtype=args.dtype,
        output_path=Path(args.output_path),
        log_samples=args.log_samples,
        rerun=args.rerun,
        imports=args.imports,
    )
