"""The model that several verbs load."""

from __future__ import annotations

import argparse

from ..models.request import ModelRequest
from ..words.typed import parse_fields, split_list


def model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="embedded", metavar="DIR_OR_NAME", help="default: the embedded model"
    )
    group.add_argument(
        "--device",
        help="cpu, cuda, cuda:1, or auto: spread a large model over all accelerators, memory and "
        "disk (default: cuda if there is one)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on the CPU, else the checkpoint's own (default: auto)",
    )
    group.add_argument(
        "--attn_implementation", metavar="NAME", help="sdpa, eager, ... (default: transformers')"
    )
    group.add_argument(
        "--model_args",
        metavar="KEY=VALUE,...",
        help="how model and processor are loaded: revision, trust_remote_code, and for the Qwen "
        "families min_pixels and max_pixels of a picture",
    )
    group.add_argument(
        "--clip",
        metavar="DIR_OR_NAME",
        help="the CLIP checkpoint of the model's vision tower, for methods that read its text "
        "encoder (cdpruner)",
    )


def model_request(args: argparse.Namespace) -> ModelRequest:
    return ModelRequest(
        name=args.model,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        model_args=parse_fields(split_list([args.model_args or ""])),
        clip=args.clip,
    )
