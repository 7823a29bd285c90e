"""What cannot work on a decoder, refused when it is patched: signal by signal, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ...prune.budget import MethodCall
from ...prune.contract import (
    Attending,
    LayerSignal,
    Method,
    ModelShape,
    ModuleStep,
    Neurons,
    Place,
    TextAttention,
)
from ...prune.errors import MethodFieldError, UnsupportedModelError
from ..family import Family
from ..sequence.masks import deepest_cut, layer_kind


def check_decoder(call: MethodCall, family: Family) -> None:
    """Refuse a decoder whose modules a method inside it or on its cache cannot read."""
    config: Any = family.text_model.config
    _check_cuts(call, family, config)
    missing = _missing(call.method, family)
    if missing is not None:
        layer, path = missing
        raise UnsupportedModelError(
            f"{call.name} reads {path} of decoder layer {layer}, which "
            f"{type(family.text_model).__name__} does not have: use a method that acts before the "
            f"LLM."
        )
    kinds = {layer_kind(config, layer) for layer in range(_layers_cleared(call.method, family))}
    if kinds - {"full_attention"}:
        raise UnsupportedModelError(
            f"{call.name} works on the KV cache of layers that see the whole prompt, and this "
            f"decoder has {', '.join(sorted(kinds))}: use a method that acts before the LLM or "
            f"one in the decoder that leaves what was stored."
        )
    if isinstance(call.method, Attending) and "flex" in (config._attn_implementation or ""):
        raise UnsupportedModelError(
            f"{call.name} exchanges the keys of a decoding step, which the block masks of flex "
            f'attention do not allow: call model.set_attn_implementation("sdpa") first.'
        )


def _check_cuts(call: MethodCall, family: Family, config: Any) -> None:
    """Refuse cuts so deep that later layers read keys stored before them, and what is read of an
    MLP beside which others act."""
    deepest = deepest_cut(config)
    for cut in call.method.cuts(family.shape):
        if deepest is not None and cut.place is Place.DECODER and cut.layer > deepest:
            raise UnsupportedModelError(
                f"{call.name} cuts in front of decoder layer {cut.layer}, and the last "
                f"{config.num_kv_shared_layers} layers of this model read keys that layer "
                f"{deepest} and later ones store, of dropped tokens too: cut in front of layer "
                f"{deepest} at the latest, or use a method that acts before the LLM."
            )
    for need in call.method.needs(family.shape):
        if not isinstance(need, ModuleStep) or need.module != "mlp":
            continue
        if hasattr(family.text_model.layers[need.layer], "experts"):
            raise UnsupportedModelError(
                f"{call.name} reads what the MLP of decoder layer {need.layer} does, and experts "
                f"act beside it there: use a method that acts before the LLM, or fastv."
            )


def check_together(calls: Sequence[MethodCall], shape: ModelShape) -> None:
    """Refuse methods that take entries out of the same caches."""
    on_cache = [call.name for call in calls if call.method.place is Place.CACHE]
    for call in calls if on_cache else ():
        if any(cut.below for cut in call.method.cuts(shape)):
            raise MethodFieldError(
                f"{call.name} takes tokens out of the KV cache of the layers before its cut, which "
                f"{on_cache[0]} has shortened by then: leave one of them out."
            )


def _layers_cleared(method: Method, family: Family) -> int:
    """The first layers, so many, out of whose KV cache a method takes entries."""
    if method.place is Place.CACHE:
        return int(family.shape.decoder.num_layers)
    return max((cut.layer for cut in method.cuts(family.shape) if cut.below), default=0)


def _missing(method: Method, family: Family) -> tuple[int, str] | None:
    """The first layer, and the path of the module in it, that a method reads and that is not
    there."""
    shape = family.shape
    wanted: list[tuple[int, str]] = []
    for need in method.needs(shape):
        if isinstance(need, LayerSignal):
            wanted += [(need.layer, path) for path in _paths(need, family)]
    if method.place is Place.CACHE:
        layers = shape.decoder.attending
        wanted += [(n, f"self_attn.{name}") for n in layers for name in ("q_proj", "k_proj")]
    for layer, path in wanted:
        if not _has(family.text_model.layers[layer], path):
            return layer, path
    return None


def _paths(need: LayerSignal, family: Family) -> tuple[str, ...]:
    """The modules of its layer that a signal is read from."""
    names = family.layer_names
    match need:
        case TextAttention(ahead=True):
            return ("self_attn.q_proj", "self_attn.k_proj", names.norm)
        case ModuleStep(module="mlp"):
            return (names.mlp,)
        case Neurons():
            return (f"{names.mlp}.{names.down}",)
    return ("self_attn",) if need.of_attention else ()


def _has(layer: nn.Module, path: str) -> bool:
    try:
        layer.get_submodule(path)
    except AttributeError:
        return False
    return True
