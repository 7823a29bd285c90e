"""One table of signals: what shows each of them, and what reads it there.

A new signal is a class in `prune/contract/signals.py` and a row here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...prune import scores
from ...prune.contract import (
    AttentionToCls,
    ClsAttention,
    ClsAttentionOneHead,
    ClsLogits,
    Hidden,
    Keys,
    LayerSignal,
    MeanHidden,
    ModuleStep,
    Neurons,
    ReceivedAttention,
    ReceivedInLayer,
    RotaryAffinity,
    Signal,
    TextAttention,
)
from ..sequence.batch import Batch, Here
from . import decoder

ENCODER_ATTENTION = "encoder"
"""Queries and keys of an encoder layer's attention."""

HOOKS = {
    ENCODER_ATTENTION: "encoder",
    "input": "enter",
    "rotary": "enter",
    "heads": "tap",
    "heads ahead": "keys",
    "attention": "attention",
    "mlp": "mlp",
    "activations": "neurons",
}
"""The hook that shows something of a layer; `Hooks` counts who needs it."""


@dataclass(frozen=True)
class Source:
    """Where a signal comes from."""

    shown: str | Callable[[Any], str]
    """What it is read from, a key of `HOOKS`; it may depend on the signal's fields."""
    read: Callable[..., Any]
    """Of the encoder's attention: queries and keys (B, H, S, D_head), scale -> (B, S, ...). In the
    decoder: the signal, the batch, and what is shown; it notes a value for each image."""


SOURCES: Mapping[type[Signal], Source] = {
    ClsAttention: Source(ENCODER_ATTENTION, scores.cls_row),
    ClsLogits: Source(ENCODER_ATTENTION, scores.cls_logits),
    ClsAttentionOneHead: Source(ENCODER_ATTENTION, scores.cls_row_one_head),
    AttentionToCls: Source(ENCODER_ATTENTION, scores.to_cls),
    ReceivedAttention: Source(ENCODER_ATTENTION, scores.received),
    Keys: Source(ENCODER_ATTENTION, scores.keys),
    TextAttention: Source(
        lambda need: "heads ahead" if need.ahead else "heads", decoder.text_attention
    ),
    ReceivedInLayer: Source("heads", decoder.received),
    RotaryAffinity: Source("rotary", decoder.rotary_affinity),
    Hidden: Source("input", decoder.hidden),
    MeanHidden: Source("input", decoder.mean_hidden),
    ModuleStep: Source(lambda need: need.module, decoder.module_step),
    Neurons: Source("activations", decoder.neurons),
}


def shown(need: Signal) -> str | None:
    """What a signal is read from while layers run; None: from what the encoder gives."""
    source = SOURCES.get(type(need))
    if source is None:
        return None
    return source.shown if isinstance(source.shown, str) else source.shown(need)


def hear(what: str, needs: list[LayerSignal], batch: Batch, here: Here, *values: Any) -> None:
    """Read those of some signals of a decoder layer that `what` is shown for."""
    for need in needs:
        if shown(need) == what:
            SOURCES[type(need)].read(need, batch, here, *values)
