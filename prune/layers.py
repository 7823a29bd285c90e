"""Layer numbers of papers, carried over to models of another depth."""

from __future__ import annotations

from collections.abc import Iterable

from .errors import MethodFieldError


def scale_layer(published: int, *, depth_published: int, depth: int) -> int:
    """The layer at the same relative depth as `published` of `depth_published` layers.

    Exact where the depths are equal; elsewhere rounded, between 1 and the last layer.
    """
    if depth == depth_published:
        return published
    return min(max(1, round(published * depth / depth_published)), depth - 1)


def user_layer(layer: int, *, depth: int, field: str) -> int:
    """A layer number given by the user; negative numbers count from the end."""
    resolved = layer + depth if layer < 0 else layer
    if not 0 <= resolved < depth:
        raise MethodFieldError(
            f"{field}={layer} is not a layer of this model, which has {depth}: "
            f"use 0..{depth - 1}, or -1..-{depth} to count from the end."
        )
    return resolved


def nearest_layer(layer: int, allowed: Iterable[int] | None) -> int:
    """The allowed layer nearest to `layer`, the lower one of two; `None` allows every layer."""
    if allowed is None:
        return layer
    return min(allowed, key=lambda candidate: (abs(candidate - layer), candidate))
