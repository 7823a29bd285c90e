"""What cannot work on a model, refused when it is patched."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...prune.budget import MethodCall
from ...prune.contract import (
    BeforeLLM,
    InEncoder,
    LayerSignal,
    ModelShape,
    Place,
)
from ...prune.declared import check_declared
from ...prune.errors import (
    MethodFieldError,
    MissingSignalError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from ...prune.registry import method_class
from ...prune.thinned import check_thinned
from ..clip_text import ClipText
from ..family import Family
from .working import closed_encoder, working


def check_signals(call: MethodCall, family: Family, clip: ClipText | None) -> None:
    """Refuse a method whose signal the model does not compute, naming those that work."""
    shape = family.shape
    check_declared(call.method, shape)
    check_thinned(call.method, shape)
    needs = call.method.needs(shape)
    missing = [need for need in needs if shape.lacks(need)]
    if any(need.of_cls for need in missing):
        settings = ", ".join(f"{k}={v!r}" for k, v in call.method.without_cls.items())
        instead = (
            f"Set {settings} to use the mean attention that each token receives instead, "
            f"or use a method that works on it: "
            if settings
            else "Methods that work on it: "
        )
        raise MissingSignalError(
            f"{call.name} reads the CLS token, which this vision tower does not have. "
            f"{instead}{', '.join(working(family))}."
        )
    if inside := [need for need in missing if isinstance(need, LayerSignal)]:
        raise MissingSignalError(
            f"{call.name} reads {_not_there(inside[0], shape)} Methods that work on it: "
            f"{', '.join(working(family))}."
        )
    if missing:
        raise MissingSignalError(
            f"{call.name} compares image and question in the space of a CLIP text encoder, which "
            f"this vision tower was not trained with, or of which the projector does not read one "
            f"layer alone. {_without_clip(call, 'Set')}Methods that work on it: "
            f"{', '.join(working(family))}."
        )
    if clip is None and any(need.of_text_twin for need in needs):
        raise MissingSignalError(
            f"{call.name} compares image and question in CLIP's space, and needs the text encoder "
            f"of the checkpoint that the vision tower comes from: pass clip=vlmprune.ClipText."
            f'from_pretrained("openai/clip-vit-large-patch14-336", processor). '
            f"{_without_clip(call, 'Or set')}".rstrip()
        )


def _not_there(need: LayerSignal, shape: ModelShape) -> str:
    """What a decoder layer does not have of a signal, and which layers have it."""
    decoder = shape.decoder
    if need.of_attention:
        return (
            f"attention of decoder layer {need.layer}, which keeps a state instead: only the "
            f"layers {', '.join(map(str, decoder.attending))} of this model have attention."
        )
    dense = [n for n in range(decoder.num_layers) if n not in decoder.expert_layers]
    instead = f"; layers that do not: {', '.join(map(str, dense))}" if dense else ""
    return (
        f"neurons of the MLP of decoder layer {need.layer}, which sends each token to experts of "
        f"its own{instead}."
    )


def _without_clip(call: MethodCall, begins: str) -> str:
    """Fields with which the method needs no text encoder, as a sentence; nothing where it has
    none."""
    fields = ", ".join(f"{k}={v!r}" for k, v in call.method.without_clip.items())
    return f"{begins} {fields}, which reads the prompt's embeddings instead. " if fields else ""


def check_memory(images: object, calls: tuple[MethodCall, ...], family: Family) -> None:
    """Refuse to remember images with a method that chooses anew for every question."""
    if isinstance(images, bool) or not isinstance(images, int) or images < 0:
        raise MethodFieldError(
            f"remember_images={images!r}: give the number of images to remember, e.g. "
            f"remember_images=16, or 0 to remember none."
        )
    shape = family.shape
    for call in calls if images else ():
        read = [need for need in call.method.needs(shape) if need.of_prompt]
        if read:
            free = [
                name
                for name in working(family)
                if not any(need.of_prompt for need in method_class(name)().needs(shape))
            ]
            raise UnsupportedFeatureError(
                f"remember_images={images} does not go with {call.name}, which chooses tokens anew "
                f"for every question, from {read[0]}: leave remember_images out, or use a method "
                f"that does not read the prompt before the LLM: {', '.join(free)}."
            )


def check_clip(clip: ClipText, family: Family, model: nn.Module) -> None:
    width = family.vision_tower.config.hidden_size
    if clip.vision_width != width:
        raise UnsupportedModelError(
            f"clip= belongs to a vision tower of width {clip.vision_width}, and this model's is "
            f"{width} wide: load the CLIP checkpoint that the model's tower comes from."
        )


def check_encoder(calls: tuple[MethodCall, ...], family: Family) -> None:
    """Refuse what cannot be done to a vision encoder, and what cannot follow it."""
    call = next((call for call in calls if isinstance(call.method, InEncoder)), None)
    if call is None or not isinstance(call.method, InEncoder):
        return
    method, tower = call.method, family.tower
    reason = closed_encoder(method, family)
    if reason is not None:
        others = working(family, Place.ENCODER)
        instead = "another" if others else "a method that acts before the LLM"
        others = others or working(family, Place.BEFORE_LLM)
        raise UnsupportedModelError(
            f"{reason}: use {instead}. Methods that work on it: {', '.join(others)}."
        )
    attention = str(family.vision_attention[0].config._attn_implementation)
    if "flex" in attention and method.proportional:
        raise UnsupportedModelError(
            f"{call.name} adds numbers to attention's logits, which the block masks of flex "
            f'attention do not allow: call model.set_attn_implementation("sdpa") first.'
        )
    following = next((c for c in calls if isinstance(c.method, BeforeLLM)), None)
    if following is None or method.restores:
        return
    assert isinstance(following.method, BeforeLLM)  # noqa: S101  (for the types)
    if following.method.needs_grid:
        free = [
            name
            for name in working(family, Place.BEFORE_LLM)
            if not getattr(method_class(name), "needs_grid", False)
        ]
        raise MethodFieldError(
            f"{following.name} reads where tokens lie, and {call.name} leaves only some of them: "
            f"behind it use one of {', '.join(free)}."
        )
    if method.fuses(tower):
        raise MethodFieldError(
            f"{call.name} leaves a row that stands for no token, which {following.name} cannot "
            f"rank: give {call.name} fuse=False, or another method behind it."
        )


def refuse_compiled(model: nn.Module, *parts: Any) -> None:
    """Refuse a model that is compiled, or has such a part."""
    compiled: list[Any] = [getattr(part, "_compiled_call_impl", None) for part in (model, *parts)]
    if "_compiled_call" in model.__dict__ or any(call is not None for call in compiled):
        raise UnsupportedModelError(
            "This model is compiled already, and compiled code would ignore the hooks: patch the "
            "freshly loaded model first, then compile it."
        )
