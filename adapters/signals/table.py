"""One table of signals: what each is read from, what reads it, how a random one is drawn.

A new signal is a class in `prune/contract/signals.py` and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...prune import scores
from ...prune.contract import (
    AttentionToCls,
    BlockInput,
    ClipImage,
    ClipText,
    ClsAttention,
    ClsAttentionOneHead,
    ClsFeatures,
    ClsLogits,
    EncoderFeatures,
    Features,
    GistAttention,
    HeadRank,
    Hidden,
    Keys,
    LayerKeys,
    LayerSignal,
    LayerValues,
    MeanHidden,
    ModuleStep,
    Neurons,
    PixelSeed,
    ReceivedAttention,
    ReceivedInLayer,
    RotaryAffinity,
    RotaryMeans,
    Signal,
    TextAttention,
    TextEmbeddings,
    TextHidden,
    TextKeys,
    TextValues,
)
from ..sequence.batch import Batch, Here
from . import decoder, draw, encoder
from .draw import Draw

ENCODER_OUTPUT = "output"
"""What the encoder gave, and the prompt."""
ENCODER_ATTENTION = "encoder"
"""Queries and keys of an encoder layer's attention."""
ENCODER_INPUT = "encoder input"
"""Rows that enter an encoder layer."""

HOOKS = {
    ENCODER_ATTENTION: "encoder",
    "input": "enter",
    "rotary": "enter",
    "angles": "enter",
    "heads": "tap",
    "heads ahead": "keys",
    "attention": "attention",
    "mlp": "mlp",
    "activations": "neurons",
}
"""The hook that shows something of a layer; `Hooks` counts who needs it."""


def _heads(need: TextAttention | LayerKeys) -> str:
    return "heads ahead" if need.ahead else "heads"


@dataclass(frozen=True)
class Source:
    """Where a signal comes from."""

    shown: str | Callable[[Any], str]
    """What it is read from; it may depend on the signal's fields."""
    read: Callable[..., Any]
    """Of the encoder's attention: signal, queries and keys (B, H, S, D_head), scale, bias of keys
    (B, 1, 1, S) or None -> (B, S, ...); of its input: what is shown, (B, S, C); of what
    the encoder gave: images, signal -> a value for each; in the decoder: signal, batch, and what is
    shown, of which it notes a value for each image."""
    draw: Draw
    """A random one."""


def _from(read: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of `prune.scores` that needs no more than the signal's name."""
    return lambda need, *heads: read(*heads)


SOURCES: Mapping[type[Signal], Source] = {
    Features: Source(ENCODER_OUTPUT, encoder.features, draw.normal("width")),
    EncoderFeatures: Source(ENCODER_OUTPUT, encoder.encoder_features, draw.normal("encoder")),
    ClsFeatures: Source(ENCODER_OUTPUT, encoder.cls_features, draw.normal("encoder")),
    PixelSeed: Source(ENCODER_OUTPUT, encoder.pixel_seeds, draw.seed),
    ClipImage: Source(ENCODER_OUTPUT, encoder.clip_image, draw.normal("clip")),
    ClipText: Source(ENCODER_OUTPUT, encoder.clip_text, draw.normal("-", "segments", "clip")),
    TextEmbeddings: Source(
        ENCODER_OUTPUT, encoder.text_embeddings, draw.normal("-", "text", "width")
    ),
    ClsAttention: Source(ENCODER_ATTENTION, _from(scores.cls_row), draw.shares),
    ClsLogits: Source(ENCODER_ATTENTION, _from(scores.cls_logits), draw.normal()),
    ClsAttentionOneHead: Source(ENCODER_ATTENTION, _from(scores.cls_row_one_head), draw.shares),
    AttentionToCls: Source(ENCODER_ATTENTION, _from(scores.to_cls), draw.positive),
    ReceivedAttention: Source(ENCODER_ATTENTION, _from(scores.received), draw.positive),
    Keys: Source(ENCODER_ATTENTION, _from(scores.keys), draw.normal("heads", "head_width")),
    HeadRank: Source(
        ENCODER_ATTENTION,
        lambda need, *heads: scores.head_rank(*heads, rounds=need.rounds, cls_start=need.cls_start),
        draw.ranks,
    ),
    BlockInput: Source(ENCODER_INPUT, lambda shown: shown, draw.normal("encoder")),
    TextAttention: Source(_heads, decoder.text_attention, draw.attention),
    ReceivedInLayer: Source("heads", decoder.received, draw.positive),
    RotaryAffinity: Source("rotary", decoder.rotary_affinity, draw.affinity),
    Hidden: Source("input", decoder.hidden, draw.normal("width")),
    TextHidden: Source("input", decoder.text_hidden, draw.normal("-", "text", "width")),
    GistAttention: Source("heads ahead", decoder.gist_attention, draw.positive),
    LayerKeys: Source(_heads, decoder.layer_keys, draw.normal("heads", "head_width")),
    TextKeys: Source("heads", decoder.text_keys, draw.normal("-", "text", "heads", "head_width")),
    LayerValues: Source("heads", decoder.layer_values, draw.normal("heads", "head_width")),
    TextValues: Source(
        "heads", decoder.text_values, draw.normal("-", "text", "heads", "head_width")
    ),
    RotaryMeans: Source("angles", decoder.rotary_means, draw.waves),
    MeanHidden: Source("input", decoder.mean_hidden, draw.normal("-", "width")),
    ModuleStep: Source(lambda need: need.module, decoder.module_step, draw.positive),
    Neurons: Source("activations", decoder.neurons, draw.counts),
}


def shown(need: Signal) -> str:
    """What a signal is read from."""
    how = SOURCES[type(need)].shown
    return how if isinstance(how, str) else how(need)


def hear(what: str, needs: list[LayerSignal], batch: Batch, here: Here, *values: Any) -> None:
    """Read those of some signals of a decoder layer that `what` is shown for."""
    for need in needs:
        if shown(need) == what:
            SOURCES[type(need)].read(need, batch, here, *values)
