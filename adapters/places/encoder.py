"""The vision encoder: what methods declared of its attention is read while it runs, and rows leave
between its blocks.

Nothing here knows an LLM: the driver serves any encoder whose blocks are known.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from torch.nn.functional import pad

from ...prune.contract import Signal
from ..encoder import Encoder
from ..hooks import Uncopied, Undo, all_of, before, behind, shadow
from ..signals.recording import Recording
from ..signals.table import ENCODER_ATTENTION, shown
from ..tap import Names, Tap
from .driver import Driver
from .padded import PaddedPassage
from .passage import Passage

Tapped = Mapping[int, Sequence[Signal]]
"""Signals that are read in attention layers, by layer."""


class _Pass(threading.local):
    """What one thread's pass through the encoder reads, and what leaves in it."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.tapped: Tapped = {}
        self.unread: frozenset[nn.Module] = frozenset()
        self.passage: Passage | None = None


class EncoderDriver(Uncopied, Driver):
    """Reads attention layers of one encoder, lets rows leave between them, and skips layers that
    nobody reads.

    Args:
        attention: the attention module of each layer.
        skippable: the last layers, those whose output no projector reads.
        names: names of taps.
        encoder: the blocks, where rows can leave; None: they cannot.
        projectors: modules that read rows behind the encoder, or between its blocks.
    """

    def __init__(
        self,
        attention: Sequence[Any],
        skippable: Sequence[nn.Module],
        names: Names,
        encoder: Encoder | None = None,
        projectors: Sequence[Any] = (),
    ) -> None:
        self._attention, self._skippable, self._names = attention, skippable, names
        self._encoder, self._projectors = encoder, projectors
        self._pass = _Pass()
        self.hooks = {
            "encoder": self.tap,
            "block": self._hook_block,
            "project": self._hook_projector,
        }

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
        """Let a layer show its queries and keys, and compute with others."""
        listener = functools.partial(self._hear, layer)
        if self._encoder is None:
            return Tap(self._attention[layer], self._names, [listener]).remove
        block, exchange = self._encoder.blocks[layer], functools.partial(self._exchange, layer)
        return self._encoder.tap(block, self._names, listener, exchange, self._bias)

    def name_tap(self, kind: str, layer: int) -> None:
        if kind != "encoder":
            return
        if self._encoder is None:
            self._names.of(self._attention[layer].config._attn_implementation)
        else:
            self._encoder.name_tap(self._encoder.blocks[layer], self._names)

    @property
    def reading(self) -> bool:
        """Whether this thread is within `read`."""
        return self._pass.recording is not None

    @property
    def passage(self) -> Passage | None:
        """What leaves in the pass of this thread."""
        return self._pass.passage

    @contextmanager
    def read(
        self, tapped: Tapped, unread: frozenset[nn.Module], passage: Passage | None = None
    ) -> Iterator[Recording]:
        """Record signals of one pass of this thread, in which layers of `unread` do not run.

        Args:
            passage: what leaves in it.
        """
        now = self._pass
        now.recording, now.tapped, now.unread = (recording := Recording()), tapped, unread
        now.passage = passage
        try:
            yield recording
        finally:
            now.recording, now.tapped, now.unread = None, {}, frozenset()
            now.passage = None

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

    # --- a block's attention -------------------------------------------------------------------

    @torch.compiler.disable
    def _hear(
        self, layer: int, query: Tensor, key: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> None:
        now = self._pass
        if now.recording is None:
            return
        with torch.no_grad():
            bias = _seen(mask, query, key)
            if (passage := now.passage) is not None:
                passage.prepare_bias(key.shape[2])
                bias = None if passage.bias is None else passage.bias.to(query.device)
                for need in passage.reads(layer):
                    if shown(need) == ENCODER_ATTENTION:
                        passage.recording.hear(need, query, key, scaling, bias, **kwargs)
            for need in now.tapped.get(layer, ()):
                now.recording.hear(need, query, key, scaling, bias, **kwargs)

    @torch.compiler.disable
    def _bias(self, rows: Tensor) -> Tensor | None:
        """What is added to the logits of an attention that rows (B, S, C) enter."""
        if (passage := self._pass.passage) is None:
            return None
        passage.prepare_bias(rows.shape[1])
        return None if passage.bias is None else passage.bias.to(rows.device, rows.dtype)

    @torch.compiler.disable
    def _exchange(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        """What attention computes with, where rows were merged or fill a batch up."""
        passage, encoder = self._pass.passage, self._encoder
        if passage is None or encoder is None:
            return query, key, value, mask
        block = encoder.blocks[layer]
        cut = passage.cut_at(layer, "mlp")
        if cut is not None and passage.method.fused_values:
            value = passage.fuse(cut, value, functools.partial(encoder.values, block))
        if passage.bias is None:
            return query, key, value, mask
        bias = passage.bias.to(query.device)
        if "flash" not in encoder.attention_of(block):
            bias = bias.to(query.dtype)
            return query, key, value, bias if mask is None else mask + bias
        return (*_with_column(query, key, value, bias, block.attention), mask)

    # --- a block -------------------------------------------------------------------------------

    def _hook_block(self, index: int) -> Undo:
        """The hooks of a block that rows enter, or leave in."""
        assert self._encoder is not None  # noqa: S101  (for the types)
        block = self._encoder.blocks[index]
        own = functools.partial
        # Before hooks that record hidden states.
        leave = block.module.register_forward_hook(own(self._leave, index), prepend=True).remove
        return all_of(
            [
                before(block.module, own(self._enter, index), with_kwargs=True),
                before(block.norm2, own(self._before_mlp, index)),
                behind(block.tail, self._after_mlp),
                leave,
            ]
        )

    def _hook_projector(self, index: int) -> Undo:
        return behind(self._projectors[index], self._spread)

    @torch.compiler.disable
    def _enter(
        self,
        index: int,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        passage = self._pass.passage
        if passage is None or kwargs is None:  # another thread puts the hook on or takes it off
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden, kwargs = passage.enter(index, hidden, kwargs)
        if isinstance(passage, PaddedPassage) and passage.made:
            assert self._encoder is not None  # noqa: S101  (for the types)
            kwargs = self._encoder.follow(kwargs, passage.places)
        if args:
            return (hidden, *args[1:]), kwargs
        return (), {**kwargs, "hidden_states": hidden}

    @torch.compiler.disable
    def _before_mlp(
        self, index: int, module: nn.Module, args: tuple[Any, ...]
    ) -> tuple[Any, ...] | None:
        passage = self._pass.passage
        short = None if passage is None else passage.before_mlp(index, args[0])
        return None if short is None else (short,)

    @torch.compiler.disable
    def _after_mlp(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        passage = self._pass.passage
        return None if passage is None else passage.after_mlp(output)

    @torch.compiler.disable
    def _leave(self, index: int, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        passage = self._pass.passage
        return None if passage is None else passage.leave(index, output)

    @torch.compiler.disable
    def _spread(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        """The tokens of a projector in the slots of all patches, where the model looks for them."""
        passage = self._pass.passage
        if passage is None:
            return None
        spread, passage.extra = passage.spread_tokens(output)
        return spread


def _seen(mask: Any, query: Tensor, key: Tensor) -> Tensor | None:
    """An encoder's own attention mask as what `scores` reads: (B, 1, 1 or S, S)."""
    if isinstance(mask, BlockMask):  # flex attention
        size = query.shape[2], key.shape[2]
        return create_mask(mask.mask_mod, len(query), 1, *size, device=query.device)
    if mask is None or mask.dim() == 4:
        return mask  # type: ignore[no-any-return]
    seen: Tensor = mask[:, None, None].bool()  # flash attention: which rows are no padding
    return seen


def _with_column(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor, attention: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values with one more column, whose product is `bias`: kernels of flash
    attention take no numbers to add. Its width is a multiple of 8, as these want it."""
    scale = getattr(attention, "scaling", None) or attention.scale
    # Kernels multiply minus infinity by zeros elsewhere: a finite number hides a key as well.
    column = (bias / scale).clamp_min(-3e4)[:, 0, 0, :, None]
    column = column[:, None].expand(*key.shape[:3], 1).to(key.dtype)
    ones = query.new_ones(*query.shape[:3], 1)
    return (
        torch.cat([query, pad(ones, (0, 7))], -1),
        torch.cat([key, pad(column, (0, 7))], -1),
        pad(value, (0, 8)),
    )
