"""The oracle: the unpatched language model, given only as many tokens as a method keeps.

Its time is the limit of what pruning can save, with choosing and bookkeeping for nothing. Which
tokens stay does not change a time, so the first ones stand for those that a method would choose:
the logits mean nothing, and M-RoPE models are given the positions of a text. In the vision encoder
it is `slicing.py` that keeps the first rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from ...adapters.cache_names import CACHE
from ...adapters.registry import family_of
from ...adapters.sequence.masks import deepest_cut
from ...prune.errors import UnsupportedModelError

_NOT_PIXELS = ("input_ids", "attention_mask", "mm_token_type_ids")


def check_oracle(model: PreTrainedModel) -> None:
    """Refuse a decoder whose layers cannot be run in groups, each on the tokens that are left.

    Raises:
        UnsupportedModelError: layers need more than what the layers before them give.
    """
    config: Any = family_of(model).text_model.config
    if getattr(config, "hidden_size_per_layer_input", None) or deepest_cut(config) is not None:
        raise UnsupportedModelError(
            "The bench runs groups of layers on their own beside a method, and layers of this "
            "decoder have inputs of their own or read keys of earlier ones: give --meta, which "
            "reckons from sizes, or time whole answers with vlmprune sweep."
        )


def oracle_prefill(
    model: PreTrainedModel, inputs: dict[str, Tensor], cuts: Sequence[tuple[int, int]]
) -> CausalLMOutputWithPast:
    """Prefill with as many tokens as were kept, known beforehand, after the full vision encoder.

    Args:
        inputs: prompts whose pictures lie in the same columns.
        cuts: (first layer that sees fewer tokens, number of visual tokens that are left, which may
            be none); of several for one layer the last counts.

    Returns:
        logits (B, 1, V), and a cache whose layers hold what they were given.
    """
    family = family_of(model)
    core: Any = family.core
    text_model: Any = family.text_model
    ids = inputs["input_ids"]
    encoded = core.get_image_features(**{k: v for k, v in inputs.items() if k not in _NOT_PIXELS})
    features = torch.cat(list(encoded.pooler_output))
    hidden = model.get_input_embeddings()(ids)
    visual = ids[0] == model.config.image_token_id
    hidden[:, visual] = features.to(hidden.dtype).view(len(ids), -1, hidden.shape[-1])
    # Qwen3-VL adds features of its own to the first layers.
    deep = [torch.cat(list(x)) for x in getattr(encoded, "deepstack_features", None) or []]
    mask = inputs["attention_mask"]
    padded = not bool(mask.all())
    alive = torch.arange(ids.shape[1], device=ids.device)
    first_visual = int(visual.nonzero()[0])
    cache = DynamicCache(config=text_model.config)
    left = dict(cuts)
    for start, stop in pairwise(sorted({0, *left, len(text_model.layers)})):
        if start in left:
            keep = ~visual
            keep[first_visual : first_visual + left[start]] = True
            hidden = hidden[:, keep[alive]]
            alive = alive[keep[alive]]
        stored = DynamicCache(config=text_model.config)
        with _layers_alone(text_model, family.layer_names.last_norm, start, stop):
            hidden = text_model(
                inputs_embeds=hidden,
                attention_mask=mask[:, alive] if padded else None,
                use_cache=True,
                **{CACHE: stored},
                **_deep(deep[start:], visual, alive, len(ids)),
            ).last_hidden_state
        cache.layers[start:stop] = stored.layers[start:stop]
    logits = model.get_output_embeddings()(hidden[:, -1:])
    return CausalLMOutputWithPast(logits=logits, **{CACHE: cache})


@contextmanager
def _layers_alone(text_model: Any, last_norm: str, start: int, stop: int) -> Iterator[None]:
    """A text model of layers `start` to `stop` of its own, each with the mask of its kind; its last
    norm is behind the last of all alone."""
    config, layers, norm = text_model.config, text_model.layers, getattr(text_model, last_norm)
    kinds = getattr(config, "layer_types", None)
    try:
        text_model.layers = layers[start:stop]
        if stop < len(layers):
            setattr(text_model, last_norm, nn.Identity())
        if kinds is not None:
            config.layer_types = kinds[start:stop]
        yield
    finally:
        text_model.layers = layers
        setattr(text_model, last_norm, norm)
        if kinds is not None:
            config.layer_types = kinds


def _deep(
    features: Sequence[Tensor], visual: Tensor, alive: Tensor, batch_size: int
) -> dict[str, Any]:
    """Features of the layers to come, for the visual tokens that are alive."""
    if not features:
        return {}
    kept = (alive[visual[alive]] - visual.nonzero()[0]).to(features[0].device)
    return {
        "visual_pos_masks": visual[alive].expand(batch_size, -1),
        "deepstack_visual_embeds": [
            x.view(batch_size, -1, x.shape[-1])[:, kept].flatten(0, 1) for x in features
        ],
    }


def shorten(cache: Any, entries: Sequence[int]) -> None:
    """Leave the last `entries` of each layer, as a method on the cache leaves that many."""
    stored = stored_entries(cache)
    for layer, count, before in zip(cache.layers, entries, stored, strict=True):
        if before > count:
            layer.keys = layer.keys[:, :, -count:].contiguous()
            layer.values = layer.values[:, :, -count:].contiguous()


def stored_entries(cache: Any) -> list[int]:
    """Entries of each layer; 0 where a layer keeps a state instead."""
    keys = [getattr(layer, "keys", None) for layer in cache.layers]
    return [0 if one is None else one.shape[2] for one in keys]
