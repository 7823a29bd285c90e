"""What cannot work on an image encoder without an LLM, refused when it is patched or called."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...prune.amount import Budget
from ...prune.budget import MethodCall
from ...prune.contract import InEncoder, ModelShape, Place, Positions
from ...prune.declared import check_declared
from ...prune.errors import (
    BudgetError,
    MethodFieldError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from ...prune.registry import method_class, method_names
from ..clip_text import ClipText
from ..encoder import EncoderBlock
from ..image_model import ImageModel, unlike

_BUDGETS = ("keep_ratio", "keep_tokens")


def check_calls(calls: tuple[MethodCall, ...], model: ImageModel, shape: ModelShape) -> None:
    """Refuse methods of other places, budgets of the LLM, and signals that the encoder lacks."""
    name = type(model.model).__name__
    inside = ", ".join(n for n in method_names() if method_class(n).place is Place.ENCODER)
    for call in calls:
        if not isinstance(call.method, InEncoder):
            raise UnsupportedModelError(
                f"{call.name} acts {call.method.place.value}, and {name} is an image encoder: "
                f"there is no LLM here. Methods that act inside an encoder: {inside}."
            )
        check_budget(call.budget, name)
        check_declared(call.method, shape)
        for need in call.method.needs(shape):
            if shape.lacks(need):
                raise UnsupportedModelError(
                    f"{call.name} reads {need}, which {name} does not have. Other methods inside "
                    f"an encoder: {inside}."
                )
        attention = model.encoder.attention_of(model.encoder.blocks[0])
        if "flex" in attention and call.method.proportional:
            raise UnsupportedModelError(
                f"{call.name} adds numbers to attention's logits, which the block masks of flex "
                f'attention do not allow: call model.set_attn_implementation("sdpa") first.'
            )
        if call.method.proportional:
            model.check_pooling(call.name)
        if call.method.fused_values:
            model.check_values(call.name)


def check_budget(budget: Budget | None, name: str) -> None:
    if budget is not None and budget.word not in _BUDGETS:
        raise BudgetError(
            f"{budget} counts what an LLM sees, and {name} is an image encoder: there is no LLM "
            f"here. Give keep_ratio or keep_tokens, which count the patches of a picture behind "
            f"the last block."
        )


def refuse_llm_options(
    positions: Positions | None, clip: ClipText | None, remember_images: object
) -> None:
    """Refuse what is said of an LLM."""
    given = {
        "positions": positions is not None,
        "clip": clip is not None,
        "remember_images": remember_images != 0,
    }
    if named := [f"{name}=" for name, there in given.items() if there]:
        raise MethodFieldError(
            f"{', '.join(named)} {'is' if len(named) == 1 else 'are'} for models with an LLM, and "
            f"there is no LLM here: leave {'it' if len(named) == 1 else 'them'} out."
        )


@torch.no_grad()
def check_blocks(model: ImageModel) -> None:
    """Try each block once on a few rows of noise: what passes `norm2`, and what its tail gives,
    must add up to what it returns.

    Raises:
        UnsupportedModelError: they do not, or the block has other parts.
    """
    try:
        blocks = model.encoder.blocks
        model.check()
    except AttributeError as error:
        raise unlike(model.model, f"its blocks are others ({error})") from None
    parameter = next(model.tower.parameters())
    on_gpu = [parameter.device] if parameter.is_cuda else []
    with torch.random.fork_rng(devices=on_gpu):
        noise = torch.randn(1, model.encoder.prefix + 4, model.width).to(parameter)
        for number, block in enumerate(blocks):
            if not _adds_up(block, noise):
                raise unlike(
                    model.model,
                    f"block {number} ({type(block.module).__name__}) does not add its MLP to the "
                    f"rows that go into it",
                )


def _adds_up(block: EncoderBlock, noise: Tensor) -> bool:
    seen: dict[str, Tensor] = {}

    def before(module: Any, args: tuple[Any, ...]) -> None:
        seen["rows"] = args[0]

    def behind(module: Any, args: Any, output: Tensor) -> None:
        seen["added"] = output

    hooks = [
        block.norm2.register_forward_pre_hook(before),
        block.tail.register_forward_hook(behind),
    ]
    try:
        masked = "attention_mask" in inspect.signature(block.module.forward).parameters
        output = block.module(noise, **{"attention_mask": None} if masked else {})
    finally:
        for hook in hooks:
            hook.remove()
    return seen.keys() == {"rows", "added"} and torch.equal(seen["rows"] + seen["added"], output)


def refuse_call(model: ImageModel, method: InEncoder, inputs: Mapping[str, Any]) -> None:
    """Refuse a call in which rows cannot leave.

    Raises:
        UnsupportedFeatureError: blocks would run a second time, patches are dropped by chance, or
            a mask is as long as all of them.
    """
    if model.checkpointing and torch.is_grad_enabled():
        raise UnsupportedFeatureError(
            f"{method.name} removes rows inside the encoder, which cannot be combined with "
            f"gradient checkpointing, where blocks run a second time: switch it off, or call the "
            f"model under torch.no_grad() or handle.disabled()."
        )
    values = {word: inputs.get(word) for word in model.masks}
    if given := [word for word, value in values.items() if not (value is None or value is False)]:
        raise UnsupportedFeatureError(
            f"{given[0]}= is as long as all patches, and {method.name} removes some of them: leave "
            f"it out, or call the model in handle.disabled()."
        )
    dropout = getattr(model.tower, "patch_drop", None)
    if dropout is not None and bool(getattr(dropout, "prob", False)) and dropout.training:
        raise UnsupportedFeatureError(
            f"{method.name} removes rows by what they show, and this model drops patches by chance "
            f"while it is trained: build it with patch_drop_rate=0, or call model.eval()."
        )


def refuse_maps(name: str, method: InEncoder, first: int) -> UnsupportedFeatureError:
    """The error for a method of the model that returns maps of all patches, some of blocks behind
    which rows are missing; `first` is the first of these."""
    behind = (
        f"{method.name} restores rows behind the last block alone, and they are missing from block "
        f"{first} on: ask for the last block, indices=1"
        if method.restores
        else f"{method.name} leaves only some of their rows: use forward or forward_features"
    )
    return UnsupportedFeatureError(
        f"{name} returns maps of all patches, and {behind}, or call it in handle.disabled()."
    )
