"""The vision encoder: what methods declared of its attention is read while it runs.

Nothing here knows an LLM: the driver serves any encoder whose attention modules take a tap.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...prune.contract import Signal
from ..hooks import Undo, all_of, shadow
from ..signals.recording import Recording
from ..signals.tap import Names, Tap

Tapped = Mapping[int, Sequence[Signal]]
"""Signals that are read in attention layers, by layer."""


class _Pass(threading.local):
    """What one thread's pass through the encoder reads."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.tapped: Tapped = {}
        self.unread: frozenset[nn.Module] = frozenset()


class EncoderDriver:
    """Reads attention layers of one encoder, and skips layers that nobody reads.

    Args:
        attention: the attention module of each layer.
        skippable: the last layers, those whose output no projector reads.
        names: names of taps.
    """

    def __init__(
        self, attention: Sequence[Any], skippable: Sequence[nn.Module], names: Names
    ) -> None:
        self._attention, self._skippable, self._names = attention, skippable, names
        self._pass = _Pass()

    def install(self) -> Undo:
        """What is on the encoder at all times."""
        run_or_pass = self._run_or_pass
        return all_of(
            [
                shadow(layer, "forward", functools.partial(run_or_pass, layer))
                for layer in self._skippable
            ]
        )

    def tap(self, layer: int) -> Undo:
        """Let a layer show its queries and keys."""
        return Tap(
            self._attention[layer], self._names, [functools.partial(self._hear, layer)]
        ).remove

    def name_tap(self, layer: int) -> None:
        """Register the name of a layer's tap, which stays while taps come and go."""
        self._names.of(self._attention[layer].config._attn_implementation)

    @property
    def reading(self) -> bool:
        """Whether this thread is within `read`."""
        return self._pass.recording is not None

    @contextmanager
    def read(self, tapped: Tapped, unread: frozenset[nn.Module]) -> Iterator[Recording]:
        """Record signals of one pass of this thread, in which layers of `unread` do not run."""
        now = self._pass
        now.recording, now.tapped, now.unread = (recording := Recording()), tapped, unread
        try:
            yield recording
        finally:
            now.recording, now.tapped, now.unread = None, {}, frozenset()

    def unread(self, tapped: Tapped, skippable: Sequence[nn.Module]) -> frozenset[nn.Module]:
        """Layers behind the deepest one that the projector or a signal reads.

        Args:
            skippable: of this call; its arguments may say what the projector reads.
        """
        heard = {self._attention[layer] for layer in tapped}
        unread: list[nn.Module] = []
        for layer in reversed(skippable):
            if any(module in heard for module in layer.modules()):
                break
            unread.append(layer)
        return frozenset(unread)

    def _run_or_pass(
        self, layer: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """A layer, or its input where nobody reads its output: offloaded weights of it are then
        not loaded either."""
        if layer not in self._pass.unread:
            return original(*args, **kwargs)
        return args[0] if args else kwargs["hidden_states"]

    @torch.compiler.disable
    def _hear(
        self, layer: int, query: Tensor, key: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> None:
        now = self._pass
        if now.recording is not None:
            with torch.no_grad():
                for need in now.tapped.get(layer, ()):
                    now.recording.hear(need, query, key, scaling, **kwargs)
