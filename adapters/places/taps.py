"""Taps on the decoder's attention: who hears its queries and keys, and who exchanges them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hooks import Undo
from ..signals.decoder import Heads
from ..tap import Around, Exchange, Names, Tap
from .driver import Driver


class DecoderTaps(Driver):
    """One tap a layer, which several places share.

    Args:
        text: the text model, a `transformers` object.
        listeners: are told the layer and its heads.
        exchange: what the attention of a layer computes with instead.
        around: how it computes otherwise.
    """

    def __init__(
        self,
        text: Any,
        names: Names,
        listeners: Sequence[Callable[[int, Heads], None]],
        exchange: Callable[[int], Exchange],
        around: Callable[[int], Around],
    ) -> None:
        self._text, self._names = text, names
        self._listeners, self._exchange, self._around = listeners, exchange, around
        self.hooks = {"tap": self._tap}

    def name_tap(self, kind: str, layer: int) -> None:
        if kind == "tap":
            self._names.of(self._text.layers[layer].self_attn.config._attn_implementation)

    def _tap(self, layer: int) -> Undo:
        own = functools.partial(self._hear, layer)
        attention = self._text.layers[layer].self_attn
        exchange, around = self._exchange(layer), self._around(layer)
        return Tap(attention, self._names, [own], exchange, around).remove

    @torch.compiler.disable
    def _hear(
        self, layer: int, query: Tensor, key: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> None:
        heads = Heads(query, key, kwargs["value"], scaling, kwargs.get("softcap"))
        with torch.no_grad():
            for listener in self._listeners:
                listener(layer, heads)
