"""Which methods run on a model as they are by default: what refusals name instead."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import nn

from ...prune.contract import (
    GistAttention,
    InDecoder,
    InEncoder,
    LayerKeys,
    LayerSignal,
    Method,
    ModelShape,
    ModuleStep,
    Neurons,
    Place,
    TextAttention,
)
from ...prune.registry import default_methods
from ..core_mlp import missing_of
from ..family import Family
from ..sequence.masks import STATES, deepest_cut, layer_kind


def working(family: Family, at: Place | None = None) -> list[str]:
    """Names of methods that find all that they read, where they act.

    Args:
        at: only those that act first there.
    """
    shape = family.shape
    made = default_methods()[0].items()
    there = [(name, one) for name, one in made if at is None or one.place is at]
    return [name for name, one in there if _runs(one, family, shape)]


def _runs(made: Method, family: Family, shape: ModelShape) -> bool:
    try:
        if any(shape.lacks(need) or need.of_text_twin for need in made.needs(shape)):
            return False
        if isinstance(made, InEncoder):
            return closed_encoder(made, family) is None
        return refused_decoder(made, family) is None
    except Exception:  # it has no rule for this shape, or is somebody's own and broken
        return False


def closed_encoder(method: InEncoder, family: Family) -> str | None:
    """Why no rows can leave between the blocks of a vision encoder, as a sentence without its end;
    None: they can."""
    if family.encoder is None:
        return (
            f"{method.name} removes rows between the blocks of the vision encoder, and nothing is "
            f"known of those of {family.name}"
        )
    layers = getattr(family.model.config, "vision_feature_layer", None)
    if isinstance(layers, list | tuple) and len(layers) > 1:
        return (
            f"{method.name} removes rows inside the vision encoder, and this model's projector "
            f"reads several of its layers ({', '.join(map(str, layers))}) side by side"
        )
    if family.encoder.packed and method.restores:
        return (
            f"{method.name} needs an encoder that sees each picture on its own, and that of "
            f"{family.name} takes the patches of all as one sequence"
        )
    return None


def refused_decoder(method: Method, family: Family) -> str | None:
    """Why a method inside a decoder or on its cache cannot act there, as a sentence that goes on
    with what to use; None: it can."""
    config: Any = family.text_model.config
    deepest = deepest_cut(config)
    for cut in method.cuts(family.shape):
        if deepest is not None and cut.place is Place.DECODER and cut.layer > deepest:
            return (
                f"{method.name} cuts in front of decoder layer {cut.layer}, and the last "
                f"{config.num_kv_shared_layers} layers of this model read keys that layer "
                f"{deepest} and later ones store, of dropped tokens too: "
                f"{_shallower(method, family.shape, deepest)}, or"
            )
    if (beside := _beside_experts(method, family)) is not None:
        return (
            f"{method.name} reads what the MLP of decoder layer {beside} does, and experts act "
            f"beside it there:"
        )
    missing = _missing(method, family)
    if missing is not None:
        layer, path = missing
        return (
            f"{method.name} reads {path} of decoder layer {layer}, which "
            f"{type(family.text_model).__name__} does not have:"
        )
    if (unthinned := _unthinned(method, family)) is not None:
        return unthinned
    kinds = {layer_kind(config, layer) for layer in range(_layers_cleared(method, family))}
    if method.place is Place.CACHE:
        kinds -= {*STATES}  # which it leaves alone
    if kinds - {"full_attention"}:
        return (
            f"{method.name} works on the KV cache of layers that see the whole prompt, and this "
            f"decoder has {', '.join(sorted(kinds))}:"
        )
    first = method.cuts(family.shape)[0].layer if weighs(method) else config.num_hidden_layers
    kinds = {layer_kind(config, layer) for layer in range(first, config.num_hidden_layers)}
    if kinds - {"full_attention"}:
        return (
            f"{method.name} adds numbers to the logits of keys in all layers from {first} on, and "
            f"this decoder has {', '.join(sorted(kinds))} there:"
        )
    return None


def _shallower(method: Method, shape: ModelShape, deepest: int) -> str:
    """What to type so that no cut is behind layer `deepest`: the method's own field where it is
    one number."""
    if any(field.name == "layer" for field in fields(method)):
        moved = replace(method, layer=deepest)  # type: ignore[call-arg]
        if max(cut.layer for cut in moved.cuts(shape)) <= deepest:
            return f"give layer={deepest} or less"
    return f"cut in front of layer {deepest} at the latest"


def weighs(method: Method) -> bool:
    """Whether a method adds numbers to the logits of keys in the decoder."""
    return isinstance(method, InDecoder) and method.proportional


def _layers_cleared(method: Method, family: Family) -> int:
    """The first layers, so many, out of whose KV cache a method takes entries."""
    if method.place is Place.CACHE:
        return int(family.shape.decoder.num_layers)
    return max((cut.layer for cut in method.cuts(family.shape) if cut.below), default=0)


def _beside_experts(method: Method, family: Family) -> int | None:
    """The first layer of whose MLP a method reads what it does, while experts act beside it."""
    for need in method.needs(family.shape):
        if not isinstance(need, ModuleStep) or need.module != "mlp":
            continue
        if hasattr(family.text_model.layers[need.layer], "experts"):
            return need.layer
    return None


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


def _unthinned(method: Method, family: Family) -> str | None:
    """Why a layer cannot be thinned as the method declares, as `refused_decoder` says it."""
    if not isinstance(method, InDecoder):
        return None
    for one in method.thinned(family.shape):
        mlp = getattr(family.text_model.layers[one.layer], family.layer_names.mlp)
        if one.neurons < 1 and (missing := missing_of(mlp)) is not None:
            return (
                f"{method.name} decodes with some of the neurons of decoder layer {one.layer}, and "
                f"its {type(mlp).__name__} {missing}: leave neurons out, or"
            )
    return _unheaded(method, family)


def _unheaded(method: InDecoder, family: Family) -> str | None:
    """Why heads or values cannot be left out."""
    found, config = method.thinned(family.shape), family.text_model.config
    implementation = config._attn_implementation or ""
    if any(one.values < 1 for one in found) and implementation not in ("sdpa", "eager"):
        return (
            f"{method.name} reads some of the values, for which {implementation} has no kernel: "
            f'call model.set_attn_implementation("sdpa") first, leave values out, or'
        )
    if not any(one.heads < 1 for one in found):
        return None
    if "flex" in implementation:
        return (
            f"{method.name} leaves heads out, which the block masks of {implementation} do not "
            f'allow: call model.set_attn_implementation("sdpa") first, leave heads out, or'
        )
    counts = set()
    for layer in family.shape.decoder.attending:
        attention = family.text_model.layers[layer].self_attn
        keys = getattr(attention, "k_proj", None)
        if keys is None:
            return (
                f"{method.name} leaves out heads of every layer from some on, and layer {layer} "
                f"of this model reads keys of an earlier one: leave heads out, or"
            )
        counts.add(keys.weight.shape[0] // attention.head_dim)
    if len(counts) > 1:
        return (
            f"{method.name} leaves out the same heads in every layer from some on, and layers of "
            f"this model have {' and '.join(map(str, sorted(counts)))} key heads: leave heads out, "
            f"or"
        )
    return None


def _paths(need: LayerSignal, family: Family) -> tuple[str, ...]:
    """The modules of its layer that a signal is read from."""
    names = family.layer_names
    match need:
        case TextAttention(ahead=True) | LayerKeys(ahead=True) | GistAttention():
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
