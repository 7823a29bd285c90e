"""What decoders differ in, by layer: windows, rotary positions, who sees whom, layers that are
not Llama's. Written against `transformers` alone, for the oracles."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from kit.family_facts import fact
from torch import Tensor
from vlmprune.adapters.cache_names import CACHE

HIDDEN = torch.finfo(torch.float32).min


def kind_of(config, layer: int) -> str:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer]
    return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding"


def window_of(config, layer: int) -> int | None:
    """Keys that a row of the layer sees at most."""
    return config.sliding_window if kind_of(config, layer).startswith("sliding") else None


def types_of(model, inputs: dict) -> Tensor | None:
    """Which tokens see each other both ways, of models where some do: (B, L)."""
    return inputs.get(fact(model, "TYPES"))


def beyond(model, embeds: Tensor, types: Tensor | None) -> dict[str, Tensor]:
    """By kind of layer, (L, L) bool: what rows of a whole prompt see besides the keys of their
    window before them, as the model's own masks for it say."""
    config = model.config.get_text_config()
    if types is None:
        return {}
    masks = model.create_masks_for_generate(
        config=model.config,
        inputs_embeds=embeds[None],
        attention_mask=None,
        position_ids=None,
        **{CACHE: None, fact(model, "TYPES"): types[None]},
    )
    masks = masks if isinstance(masks, dict) else {kind_of(config, 0): masks}
    found = {}
    for layer in range(config.num_hidden_layers):
        kind, length = kind_of(config, layer), len(embeds)
        if (mask := masks[kind]) is not None:
            seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
            found[kind] = seen & ~causal(length, window_of(config, layer))
    return found


def causal(length: int, window: int | None) -> Tensor:
    """(length, length) bool: each row sees itself and the keys of its window before itself."""
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return seen if window is None else seen.triu(1 - window)


def text_embeds(model, ids: Tensor) -> Tensor:
    """Embeddings of a prompt (L, D), in some models with those of the marks around images, which
    are the last rows of their table of visual words."""
    embeds = model.get_input_embeddings()(ids).clone()
    marks = getattr(model.model, "visual_indicator_token_ids", ())
    for number, mark in enumerate(marks, start=-len(marks)):
        embeds[ids == mark] = model.model.visual_embeddings_table.weight[number]
    return embeds


def rotary(
    decoder, hidden: Tensor, ids: Tensor, layer: int, unturned: str | None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines that a layer has of positions (axes, n): (1, n, D_head) each; in those of
    the kind `unturned` no position differs from another."""
    axes = ids[:, None]
    by_kind = "layer_type" in inspect.signature(decoder.rotary_emb.forward).parameters
    kind = (kind_of(decoder.config, layer),) if by_kind else ()
    cos, sin = decoder.rotary_emb(hidden[None], axes if len(axes) > 1 else axes[0], *kind)
    if kind_of(decoder.config, layer) == unturned:
        return torch.ones_like(cos), torch.zeros_like(sin)
    return cos, sin


def stored_lengths(cache) -> list[int]:
    """Entries of each layer of a cache, of one that keeps a state 0."""
    return [layer.keys.shape[-2] if hasattr(layer, "keys") else 0 for layer in cache.layers]


def last_norm(decoder):
    """The norm behind the last layer."""
    return decoder.embedding_norm if hasattr(decoder, "embedding_norm") else decoder.norm


def mlp_of(layer) -> tuple:
    """The MLP of a layer, and its last projection; None: experts have none for all tokens."""
    if hasattr(layer, "feed_forward"):  # LFM2
        return layer.feed_forward, layer.feed_forward.w2
    return layer.mlp, getattr(layer.mlp, "down_proj", None)


def head(model, hidden: Tensor) -> Tensor:
    """Logits of hidden states behind the last norm."""
    config = model.config.get_text_config()
    logits = model.lm_head(hidden)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else (logits / cap).tanh() * cap


@dataclass
class Observed:
    """One layer of one prompt, as its modules ran: (n, ...) or (H, n, D_head)."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    maps: Tensor
    attention: tuple[Tensor, Tensor]
    mlp: tuple[Tensor, Tensor]
    neurons: Tensor | None
    output: Tensor


def observe(layer, hidden: Tensor, tables, mask: Tensor, **more) -> Observed:
    """What an eager layer makes of an input (n, D).

    Args:
        tables: (n, D_head) each.
        mask: (n, n), added to logits.
    """
    seen: dict[str, object] = {}
    attends, (mlp, down) = hasattr(layer, "self_attn"), mlp_of(layer)
    with ExitStack() as open_:
        if attends:
            open_.enter_context(_heads(layer.self_attn, seen))
            open_.enter_context(_run("attention", layer.self_attn, seen))
        open_.enter_context(_run("mlp", mlp, seen))
        if down is not None:
            open_.enter_context(_run("neurons", down, seen))
        output = layer(
            hidden[None],
            position_embeddings=tuple(table[None] for table in tables),
            attention_mask=mask[None, None] if attends else None,
            **more,
        )
    nothing = hidden[:0][None]  # of a layer that keeps a state
    queries, keys, values = seen.get("heads", (nothing, nothing, nothing))
    given, (added, maps) = seen.get("attention", (nothing, (nothing, nothing)))
    before, after = seen["mlp"]
    output = output[0] if isinstance(output, tuple) else output
    neurons = None if down is None else seen["neurons"][0][0]
    return Observed(
        queries=queries[0],
        keys=keys[0],
        values=values[0],
        maps=maps[0],
        attention=(given[0], added[0]),
        mlp=(before[0], after[0]),
        neurons=neurons,
        output=output[0],
    )


@contextmanager
def _heads(attention, seen: dict) -> Iterator[None]:
    """Note queries, keys and values that eager attention is given."""
    module = sys.modules[type(attention).__module__]
    eager = module.eager_attention_forward

    def spy(module, query, key, value, mask, **kwargs):
        seen["heads"] = query, key, value
        return eager(module, query, key, value, mask, **kwargs)

    with mock.patch.object(module, "eager_attention_forward", spy):
        yield


@contextmanager
def _run(name: str, part, seen: dict) -> Iterator[None]:
    """Note input and output of a module."""

    def note(module, args, kwargs, output):
        seen[name] = (args[0] if args else kwargs["hidden_states"]), output

    hook = part.register_forward_hook(note, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
