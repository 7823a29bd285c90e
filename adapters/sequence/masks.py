"""Attention masks for layers that store fewer keys than the first layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import (
    blockwise_overlay,
    create_causal_mask,
    create_recurrent_attention_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from ..both_ways import BothWays
from ..cache_names import CACHE

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig


STATES = ("linear_attention", "conv")
"""Kinds of layers that keep a state of fixed size instead of keys and values."""


def layer_kind(config: PreTrainedConfig, layer: int) -> str:
    """`full_attention` or `sliding_attention`, or one of `STATES`; layers of one kind can share a
    mask."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer]
    window = getattr(config, "sliding_window", None)
    return "full_attention" if window is None else "sliding_attention"


def stored_at(config: PreTrainedConfig, layer: int) -> int:
    """The layer whose keys a layer reads: its own, or, of the last layers that share them, those of
    the last layer of its kind that stores any."""
    first = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)
    if layer < first:
        return layer
    kind = layer_kind(config, layer)
    return next(n for n in reversed(range(first)) if layer_kind(config, n) == kind)


def moved_mask(memo: Mapping[Any, Any], key: tuple[Any, ...]) -> Any:
    """The mask that was made for the layers which store what others read, on another device: the
    last part of the key."""
    made = next(made for other, made in memo.items() if other[:-1] == key[:-1])
    return None if made is None else made.to(key[-1])


def deepest_cut(config: PreTrainedConfig) -> int | None:
    """The last layer in front of which tokens can leave, where the last layers read keys that
    earlier ones stored: behind it these would hold dropped tokens. None: any layer."""
    read = [stored_at(config, layer) for layer in range(config.num_hidden_layers)]
    return min((at for layer, at in enumerate(read) if at != layer), default=None)


def tells_length(config: PreTrainedConfig, cache: Cache | None) -> bool:
    """Whether a 2-D mask alone tells how much of a static cache is filled, padding or not: flash
    attention takes its keys by it."""
    flash = "flash" in (config._attn_implementation or "")
    return flash and bool(getattr(cache, "is_compileable", False))


def layer_mask(
    config: PreTrainedConfig,
    layer: int,
    hidden_states: Tensor,
    padding: Tensor | None,
    cache: Cache | None,
    both_ways: BothWays | None = None,
    weights: Tensor | None = None,
) -> Any:
    """The mask that decoder layer `layer` needs, in the form its attention implementation wants.

    Args:
        hidden_states: (B, L, D), the layer's input.
        padding: (B, P + L) bool over stored and new columns, or `None` where nothing is padded.
        both_ways: of the L new columns.
        weights: (B, S) what is added to the logits of the first columns; None: nothing.
    """
    kind = layer_kind(config, layer)
    if kind in STATES:
        return create_recurrent_attention_mask(config, hidden_states, padding)
    sliding = kind == "sliding_attention"
    create = create_sliding_window_causal_mask if sliding else create_causal_mask
    more: dict[str, Any] = {}
    if both_ways is not None and kind in both_ways.kinds:
        blocks = both_ways.blocks.to(hidden_states.device)
        length, offset = blocks.shape[1], 0
        if cache is not None:
            length, offset = cache.get_mask_sizes(length, layer)
        blocks = _by_column(blocks, cache, layer, int(length + offset))
        if sliding and both_ways.windowed:
            create = create_causal_mask
            more["or_mask_function"] = blockwise_overlay(blocks)
            more["and_mask_function"] = sliding_window_overlay(config.sliding_window)
        else:
            more["block_sequence_ids"] = blocks
    if weights is not None and "and_mask_function" not in more:
        more["and_mask_function"] = _anything  # without one there may be no mask to add to
    made = create(
        config=config,
        inputs_embeds=hidden_states,
        attention_mask=padding,
        position_ids=None,
        layer_idx=layer,
        **{CACHE: cache},
        **more,
    )
    return made if weights is None else _weighed(made, weights, hidden_states.dtype)


def _anything(batch: Any, head: Any, query: Any, key: Any) -> Tensor:
    """A mask function that hides nothing."""
    return query >= -1


def _weighed(mask: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask (B, 1, L, S), bool or to be added, with `weights` (B, K) of the first K columns."""
    if mask.dtype == torch.bool:
        hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        mask = hidden.masked_fill(~mask, torch.finfo(dtype).min)
    more = pad(weights.to(mask.device), (0, mask.shape[-1] - weights.shape[1]))
    return mask + more[:, None, None].to(dtype)


def _by_column(blocks: Tensor, cache: Cache | None, layer: int, width: int) -> Tensor:
    """Blocks of new columns (B, L) as those of `width` columns that a mask counts: stored ones in
    front, and what a static cache has room for."""
    stored = 0 if cache is None else int(cache.get_query_offset(layer))
    front = blocks.new_full((len(blocks), stored), -1)
    behind = blocks.new_full((len(blocks), width - stored - blocks.shape[1]), -1)
    return torch.cat([front, blocks, behind], 1)
