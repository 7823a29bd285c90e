"""What methods leave out of decoder layers beside tokens: declared, checked, and chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from .answers.answer import looks_at_values
from .answers.left import check_left
from .budget import MethodCall
from .contract import InDecoder, Method, ModelShape, Thinned
from .errors import MethodFieldError


def thinning(calls: Iterable[MethodCall], shape: ModelShape) -> InDecoder | None:
    """The method that leaves something out of layers; at most one acts in the decoder."""
    inside = (call.method for call in calls if isinstance(call.method, InDecoder))
    return next((method for method in inside if method.thinned(shape)), None)


def thinned_layers(calls: Iterable[MethodCall], shape: ModelShape) -> Mapping[int, Thinned]:
    """By layer, what is left out of it."""
    method = thinning(calls, shape)
    return {} if method is None else {one.layer: one for one in method.thinned(shape)}


def check_thinned(method: Method, shape: ModelShape) -> None:
    """Refuse declarations that mean nothing on a model of this shape.

    Raises:
        MethodFieldError: what is wrong, and what to return instead.
    """
    if not isinstance(method, InDecoder):
        return
    found = method.thinned(shape)
    if not isinstance(found, tuple) or not all(isinstance(one, Thinned) for one in found):
        raise MethodFieldError(
            f"{method.name}.thinned returned {found!r}: return a tuple of Thinned, or ()."
        )
    layers, depth = [one.layer for one in found], shape.decoder.num_layers
    if layers != sorted({*layers} & {*range(depth)}):
        raise MethodFieldError(
            f"{method.name}.thinned names layers {layers}: they must ascend, each once, from 0 to "
            f"{depth - 1}."
        )
    for one in found:
        if not all(0 < share <= 1 for share in (one.heads, one.values, one.neurons)):
            raise MethodFieldError(
                f"{method.name}.thinned has {one}: a share is a number above 0, up to 1 (all)."
            )
        if one.attention and one.layer not in shape.decoder.attending:
            raise MethodFieldError(
                f"{method.name}.thinned has {one}, which keeps a state and has no attention: only "
                f"the layers {', '.join(map(str, shape.decoder.attending))} have."
            )
    _check_heads(method, found, shape)


def _check_heads(method: Method, found: Sequence[Thinned], shape: ModelShape) -> None:
    """That heads leave behind a layer with attention, and stay away."""
    attending, at = shape.decoder.attending, {one.layer: one.heads for one in found}
    shares = [at.get(layer, 1.0) for layer in attending]
    if shares != sorted(shares, reverse=True):
        raise MethodFieldError(
            f"{method.name}.thinned has heads {shares} in layers {[*attending]}: heads that are "
            f"out stay out, so that shares must not rise."
        )
    if shares and shares[0] < 1:
        raise MethodFieldError(
            f"{method.name}.thinned leaves heads out of layer {attending[0]}: no layer with "
            f"attention has run before it, by which they could be chosen."
        )


def heads(method: InDecoder, given: Tensor, keep: int, *, debug: bool) -> Tensor:
    """The heads (B, K) that a method keeps of those alive, checked; `given` are (B, l, A).

    Raises:
        MethodAnswerError: the rule that is broken, the value, and what to return instead.
    """
    found = method.choose_heads(given, keep)
    values = looks_at_values(method, debug)
    shape, count = (len(given), keep), given.shape[2]
    return check_left(method, "choose_heads", found, shape, count, "heads", values)


def core_neurons(method: InDecoder, activations: Tensor, keep: int, *, debug: bool) -> Tensor:
    """The neurons (K,) that a method keeps of a layer, checked; `activations` are (n, M).

    Raises:
        MethodAnswerError: the rule that is broken, the value, and what to return instead.
    """
    found = method.core_neurons(activations, keep)
    values, count = looks_at_values(method, debug), activations.shape[1]
    return check_left(method, "core_neurons", found, (keep,), count, "neurons", values)
