"""Attention masks for layers that store fewer keys than the first layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from ..cache_names import CACHE

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig


def layer_kind(config: PreTrainedConfig, layer: int) -> str:
    """`full_attention` or `sliding_attention`; layers of one kind can share a mask."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer]
    window = getattr(config, "sliding_window", None)
    return "full_attention" if window is None else "sliding_attention"


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
) -> Any:
    """The mask that decoder layer `layer` needs, in the form its attention implementation wants.

    Args:
        hidden_states: (B, L, D), the layer's input.
        padding: (B, P + L) bool over stored and new columns, or `None` where nothing is padded.
    """
    sliding = layer_kind(config, layer) == "sliding_attention"
    create = create_sliding_window_causal_mask if sliding else create_causal_mask
    return create(
        config=config,
        inputs_embeds=hidden_states,
        attention_mask=padding,
        position_ids=None,
        layer_idx=layer,
        **{CACHE: cache},
    )
