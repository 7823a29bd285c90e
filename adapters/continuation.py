"""Calls after a pruned prefill: decoding and further text on a cache that stores less.

The caller counts logically (positions, 2-D masks as long as everything it fed); the cache stores
less, and not the same in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .cache import PrunedState, pruned_state
from .masks import layer_kind, layer_mask, tells_length
from .setup import Setup


def continue_text(setup: Setup, state: PrunedState, kwargs: dict[str, Any]) -> Tensor | None:
    """Translate positions and mask of the text model's arguments, in place.

    Returns:
        the caller's position ids of the new tokens; None where no segment has positions of its own.
    """
    embeds, cache = kwargs["inputs_embeds"], kwargs["past_key_values"]
    mask, ids = kwargs.get("attention_mask"), kwargs.get("position_ids")
    length = embeds.shape[1]
    if ids is not None:
        ids = ids[..., -length:]
    shifted = any(segment.shift is not None for segment in state.segments)
    if shifted and ids is None:
        ids = torch.arange(length, device=embeds.device)[None] + cache.get_seq_length()
    first = state.segments[0].shift
    kwargs["position_ids"] = ids if first is None or ids is None else ids - first.to(ids.device)
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        return ids if shifted else None  # a static cache: generate() built it
    # A single new token is always real; more of them may be padded.
    if mask is not None and length > 1 and not bool(mask[:, -length:].all()):
        new = mask[:, -length:].to(embeds.device, torch.bool)
        for segment in state.segments:
            segment.padding = segment.extended(int(cache.physical_length(segment.start)), new)
    kwargs["attention_mask"] = first_padding(setup, state, cache, length)
    return ids if shifted else None


def continue_layer(
    setup: Setup,
    layer: int,
    hidden: Tensor,
    kwargs: Mapping[str, Any],
    ids: Tensor | None,
    memo: dict[Any, Any],
) -> dict[str, Any] | None:
    """Arguments of a layer that stores less than the first, for which the model made its mask and
    its rotary tables.

    Args:
        ids: what `continue_text` returned.
        memo: what was made for earlier layers of the same call; added to.

    Returns:
        new keyword arguments, or None where the given ones serve.
    """
    cache = kwargs.get("past_key_values")
    state = pruned_state(cache)
    if state is None or (segment := state.segment(layer)).start == 0:
        return None
    new: dict[str, Any] = {}
    if kwargs.get("attention_mask") is not None or segment.padding is not None:
        kind = layer_kind(setup.config, layer)
        key: tuple[Any, ...] = ("mask", segment.start, kind, hidden.device)
        if key not in memo:
            padding = segment.padding_to(_mask_length(setup, cache, hidden.shape[1], layer))
            memo[key] = layer_mask(setup.config, layer, hidden, padding, cache)
        new["attention_mask"] = memo[key]
    if ids is not None:
        key = ("rotary", segment.start, hidden.device)
        if key not in memo:
            own = ids if segment.shift is None else ids - segment.shift.to(ids.device)
            memo[key] = setup.rotary(hidden, own)
        new["position_embeddings"] = memo[key]
    return {**kwargs, **new} if new else None


def first_padding(setup: Setup, state: PrunedState, cache: Any, queries: int) -> Tensor | None:
    """The 2-D mask of the first layer, from which generate() builds its own for a static cache."""
    return state.segments[0].padding_to(_mask_length(setup, cache, queries, 0))


def _mask_length(setup: Setup, cache: Any, queries: int, layer: int) -> int:
    """Columns that a mask over stored and new tokens has in `layer`."""
    if tells_length(setup.config, cache):
        return int(cache.physical_length(layer)) + queries
    length, offset = cache.get_mask_sizes(queries, layer)
    return int(length + offset)
