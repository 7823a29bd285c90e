"""Schedules of several cuts: at given layers of the decoder, given shares of an image's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from .contract import Cut, Place
from .errors import MethodFieldError
from .layers import scale_layers, user_layer

_ALLOWED = {
    "layers": "give a tuple of layer numbers, e.g. (8, 16, 24), each the first that sees fewer "
    "tokens (negative counts from the end)",
    "ratios": "give a tuple of shares of all tokens, between 0 and 1 and falling from cut to cut, "
    "e.g. (0.5, 0.25, 0.125)",
}


def check_layers(value: Any) -> None:
    """Refuse everything but a tuple of whole numbers. The model's depth is not known here."""
    if not (_is_tuple_of(value, int) and value):
        raise MethodFieldError(f"layers={value!r} is not possible: {_ALLOWED['layers']}.")


def check_ratios(value: Any) -> None:
    """Refuse everything but a tuple of numbers between 0 and 1, each below the one before."""
    fine = _is_tuple_of(value, int | float) and value
    if not (fine and all(above > below for above, below in pairwise((1, *value, 0)))):
        raise MethodFieldError(f"ratios={value!r} is not possible: {_ALLOWED['ratios']}.")


def _is_tuple_of(value: Any, kind: Any) -> bool:
    return isinstance(value, tuple) and all(
        isinstance(item, kind) and not isinstance(item, bool) for item in value
    )


def cut_layers(
    given: Sequence[int] | None,
    published: Sequence[int],
    *,
    depths_published: Sequence[int],
    depth: int,
) -> tuple[int, ...]:
    """The layers of a schedule on a decoder of `depth` layers: the user's, or the paper's.

    Raises:
        MethodFieldError: the user's do not ascend, or begin with the first layer of all.
        UnsupportedModelError: the model has too few layers for the paper's.
    """
    if given is None:
        return scale_layers(published, depths_published=depths_published, depth=depth)
    layers = tuple(user_layer(layer, depth=depth, field="layers") for layer in given)
    if any(first >= second for first, second in pairwise((0, *layers))):
        raise MethodFieldError(
            f"layers={tuple(given)!r} are the layers {', '.join(map(str, layers))} of this model, "
            f"which has {depth}: give ascending ones in 1..{depth - 1}, each the first that sees "
            f"fewer tokens."
        )
    return layers


def cuts_at(layers: Sequence[int], ratios: Sequence[float]) -> tuple[Cut, ...]:
    """A cut at each of the layers. Of the ratios only their proportions matter: how many tokens
    stay in the end is the budget's to say."""
    shares = [ratio / ratios[-1] for ratio in ratios]
    return tuple(Cut(Place.DECODER, *at) for at in zip(layers, shares, strict=True))
