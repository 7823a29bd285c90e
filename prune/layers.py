"""Layer numbers of papers, carried over to models of another depth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .contract import ModelShape, Tower
from .errors import MethodFieldError, UnsupportedModelError


def scale_layer(published: int, *, depth_published: int, depth: int) -> int:
    """The layer at the same relative depth as `published` of `depth_published` layers.

    Exact where the depths are equal; elsewhere rounded, between 1 and the last layer.
    """
    if depth == depth_published:
        return published
    return min(max(1, round(published * depth / depth_published)), depth - 1)


def scale_layers(
    published: Sequence[int], *, depths_published: Sequence[int], depth: int
) -> tuple[int, ...]:
    """Ascending layers, one for each of `published`, at the same relative depths.

    Exact at each of the published depths; elsewhere scaled from the first of them, and moved where
    they would fall together.

    Raises:
        UnsupportedModelError: the model has too few layers.
    """
    if depth in depths_published:
        return tuple(published)
    if depth <= len(published):
        raise UnsupportedModelError(
            f"{len(published)} cuts need a decoder of more layers than that; this one has {depth}: "
            f"use a method with fewer cuts (fastv)."
        )
    layers = [
        scale_layer(layer, depth_published=depths_published[0], depth=depth) for layer in published
    ]
    for i in range(1, len(layers)):
        layers[i] = max(layers[i], layers[i - 1] + 1)
    for i in reversed(range(len(layers))):
        layers[i] = min(layers[i], depth - len(layers) + i)
    return tuple(layers)


def user_layer(layer: int, *, depth: int, field: str) -> int:
    """A layer number given by the user; negative numbers count from the end."""
    resolved = layer + depth if layer < 0 else layer
    if not 0 <= resolved < depth:
        raise MethodFieldError(
            f"{field}={layer} is not a layer of this model, which has {depth}: "
            f"use 0..{depth - 1}, or -1..-{depth} to count from the end."
        )
    return resolved


def cut_layer(layer: int, shape: ModelShape, hint: str) -> int:
    """The first decoder layer that sees fewer tokens, as a user gives it in a field `layer`.

    Raises:
        MethodFieldError: it is the first layer, or there is no such one; `hint` says what to give.
    """
    cut = user_layer(layer, depth=shape.decoder.num_layers, field="layer")
    if cut == 0:
        raise MethodFieldError(f"layer={layer} is the first layer: {hint}.")
    return cut


def nearest_layer(layer: int, allowed: Iterable[int] | None) -> int:
    """The allowed layer nearest to `layer`, the lower one of two; `None` allows every layer."""
    if allowed is None:
        return layer
    return min(allowed, key=lambda candidate: (abs(candidate - layer), candidate))


def encoder_layer(
    given: int | None, published: int, tower: Tower, *, depth_published: int = 24, field: str
) -> int:
    """The ViT layer that a rule reads: the user's, or the published one at the same place.

    Args:
        given: the user's layer, or None. It must see the whole image.
        published: the paper's layer on `depth_published` layers; negative counts from the end on
            every depth. In a windowed encoder it snaps to the nearest layer that sees it all.
        field: the name of the user's field, for the error.
    """
    depth = tower.num_layers
    if given is None:
        if published < 0:
            layer = max(published + depth, 0)
        else:
            layer = scale_layer(published, depth_published=depth_published, depth=depth)
        return nearest_layer(layer, tower.full_attention)
    layer = user_layer(given, depth=depth, field=field)
    if tower.full_attention is not None and layer not in tower.full_attention:
        raise MethodFieldError(
            f"{field}={given} is a layer with windowed attention in this model: use one of "
            f"{', '.join(map(str, tower.full_attention))}."
        )
    return layer


def cut_behind_attention(layer: int, shape: ModelShape, name: str, hint: str) -> int:
    """The first layer that sees fewer tokens, where attention of a layer before it is read: `layer`
    as a user gives it, or what is behind the first layer with attention, if that is deeper.

    Raises:
        MethodFieldError: it is the first layer, or there is no such one; `hint` says what to give.
        UnsupportedModelError: only the decoder's last layer has attention.
    """
    cut = cut_layer(layer, shape, hint)
    cut = max(cut, shape.decoder.attends_before(cut) + 1)
    if cut >= shape.decoder.num_layers:
        raise UnsupportedModelError(
            f"{name} cuts behind a layer with attention, and only the last layer of this decoder "
            f"has it: use a method that acts before the LLM."
        )
    return cut
