"""What methods leave out of decoder layers beside tokens: declared, checked, and chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from .answers.answer import looks_at_values
from .budget import MethodCall
from .contract import InDecoder, Method, ModelShape, Thinned
from .errors import MethodAnswerError, MethodFieldError


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
    if wrong := next((one for one in found if not 0 < one.neurons <= 1), None):
        raise MethodFieldError(
            f"{method.name}.thinned has {wrong}: a share is a number above 0, up to 1 (all)."
        )


def core_neurons(method: InDecoder, activations: Tensor, keep: int, *, debug: bool) -> Tensor:
    """The neurons (K,) that a method keeps of a layer, checked; `activations` are (n, M).

    Raises:
        MethodAnswerError: the rule that is broken, the value, and what to return instead.
    """
    found = method.core_neurons(activations, keep)
    fits = isinstance(found, Tensor) and found.dtype == torch.int64 and found.shape == (keep,)
    if fits and looks_at_values(method, debug):
        rises = found.diff(prepend=found.new_tensor([-1])) > 0
        fits = bool(rises.all()) and int(found[-1]) < activations.shape[1]
    if not fits:
        said = found.tolist() if isinstance(found, Tensor) else found
        raise MethodAnswerError(
            f"{method.name}.core_neurons returned {said!r} of {activations.shape[1]} neurons: "
            f"return the numbers of exactly {keep} of them, int64 ({keep},), ascending, each once."
        )
    return found
