"""Rows of pictures on their way through one pass of a vision encoder, from cut to cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...prune.batches import alike
from ...prune.contract import BlockCut, BlockInput, EncoderRows, InEncoder, Reduction, Signal, Tower
from ...prune.contract.reduction import take
from ...prune.reductions import reduce
from ..signals.recording import Recording
from ..stopwatch import Stopwatch
from .picture import Alike, Picture

Keywords = dict[str, Any]


class Passage(ABC):
    """One pass of an encoder, in which a method removes rows.

    Args:
        pictures: all that the encoder is given, in its order.
        prefix: rows in front of each picture's.
        unit: rows of the encoder behind one row of the method.
        debug: look at the numbers that shipped methods return, too.
    """

    sorts: bool = False
    """Whether rows must stay in the order of their places."""

    def __init__(
        self,
        method: InEncoder,
        tower: Tower,
        pictures: Sequence[Picture],
        device: torch.device,
        *,
        prefix: int,
        unit: int,
        debug: bool,
    ) -> None:
        self.method, self.tower = method, tower
        self.cuts = method.blocks(tower)
        self.stopwatch = Stopwatch(device)
        self.prefix, self.unit, self._debug = prefix, unit, debug
        self.num_pictures = len(pictures)
        kinds = alike(picture.kind for picture in pictures)
        self.groups = [Alike.of(pictures, numbers, device) for numbers in kinds]
        self.recording = Recording()
        self.bias: Tensor | None = None
        """Of the attention that runs: (B, 1, 1, S), added to its logits."""
        self.made = 0
        """Cuts that rows have passed."""
        self.entered: Tensor | None = None
        """Rows as they entered the block that runs, where its attention needs them."""
        self.extra: list[Tensor] = []
        """Per picture, the tokens of rows that stand for no patch (R, D)."""
        self.restored = False
        """Whether all rows are there again."""
        self.entering: list[tuple[list[int], list[int]]] = []
        """Per block that ran: rows of each picture at its attention, and at its MLP."""
        self._open: tuple[Tensor, Tensor | None] | None = None
        """In a block whose rows leave in front of its MLP: the rows that stay, and what it adds."""
        self._uncut: tuple[Tensor, Sequence[Reduction | None]] | None = None
        """Rows that are to be restored, and how they were reduced, by group."""

    # --- what is cut, and where ---------------------------------------------------------------

    def cut_at(self, block: int, at: str) -> int | None:
        """The number of the cut that is due there."""
        found = [n for n, cut in enumerate(self.cuts) if (cut.block, cut.at) == (block, at)]
        return found[0] if found else None

    def reads(self, block: int) -> list[Signal]:
        """What the method reads of a block."""
        return [
            need
            for cut in self.cuts
            if cut.block == block
            for need in self.method.reads(cut, self.tower)
        ]

    @property
    def counts(self) -> list[int]:
        """Rows of each picture now."""
        found = [0] * self.num_pictures
        for group in self.groups:
            for picture in group.pictures:
                found[picture] = group.rows
        return found

    # --- a block ------------------------------------------------------------------------------

    def enter(self, block: int, hidden: Tensor, kwargs: Keywords) -> tuple[Tensor, Keywords]:
        """The inputs of a block."""
        for need in self.reads(block):
            if isinstance(need, BlockInput):
                shown = hidden.detach()
                self.recording.note(need, shown[None] if shown.dim() == 2 else shown)
        if (cut := self.cut_at(block, "block")) is not None:
            self.decide(cut)
            if self.method.restores and self.leaves:
                self._uncut = hidden, [group.made for group in self.groups]
            hidden = self.shorten(hidden) if self.leaves else hidden
            self.passed()
        fuses = self.method.fused_values and self.cut_at(block, "mlp") is not None
        self.entered = hidden if fuses else None
        counts = self.counts
        self.entering.append((counts, counts))
        return hidden, self.follow(kwargs)

    def decide(self, cut: int, groups: Sequence[Alike] | None = None) -> None:
        """Let the method say what becomes of the rows at a cut, from what was heard there.

        Args:
            groups: of which pictures; None: all.
        """
        with self.stopwatch, torch.autocast(self.stopwatch.device.type, enabled=False):
            here = self.cuts[cut]
            heard = {
                need: self.recording.values(need) for need in self.method.reads(here, self.tower)
            }

            def ask(group: Alike, chosen: Tensor | None, keep: int) -> Reduction:
                return self._ask(here, group, chosen, keep, heard)

            for group in self.groups if groups is None else groups:
                group.decide(cut, ask, self.sorts)

    @property
    def leaves(self) -> bool:
        """Whether rows leave by what was decided."""
        return any(group.made is not None for group in self.groups)

    def before_mlp(self, block: int, hidden: Tensor) -> Tensor | None:
        """The rows that go on from a block's attention to its MLP; None: all."""
        if (cut := self.cut_at(block, "mlp")) is None:
            return None
        if not self.method.fused_values:
            self.decide(cut)
        else:  # its attention has decided
            self.gather()
        if not self.leaves:
            self.passed()
            return None
        short = self.shorten(hidden)
        self.passed()
        self.entering[-1] = self.entering[-1][0], self.counts
        self._open = short, None
        return short

    def after_mlp(self, output: Tensor) -> Tensor | None:
        """What a block is to add to its longer rows: nothing, in a shape that fits any number."""
        if self._open is None:
            return None
        self._open = self._open[0], output
        return output.new_zeros(()).expand(*output.shape[:-2], 1, output.shape[-1])

    def leave(self, block: int, output: Tensor) -> Tensor | None:
        """What a block gives: its shorter rows and what its MLP adds; None: what it gave."""
        if self._open is not None:
            (short, added), self._open = self._open, None
            assert added is not None  # noqa: S101  (for the types)
            return short + added
        if self._uncut is not None and block == self.tower.depth_read - 1:
            (before, made), self._uncut = self._uncut, None
            self.restored = True
            return self.restore(before, made, output)
        return None

    # --- of padded and of packed pictures -----------------------------------------------------

    @abstractmethod
    def shorten(self, hidden: Tensor) -> Tensor:
        """Hidden states with the rows of every picture as decided."""

    @abstractmethod
    def fuse(self, cut: int, value: Tensor, values: Callable[[Tensor], Tensor]) -> Tensor:
        """Decide what becomes of the rows that an attention is about to mix, and give each the
        value of the row that it goes into; rows that are dropped have their own.

        Args:
            value: (B, H, S, D_head), of these rows.
            values: those of any rows of the block (B, S, C).
        """

    def gather(self) -> None:  # noqa: B027  (most decide on all pictures at once)
        """All of a block's attention has run: the decisions are those of all pictures."""

    @abstractmethod
    def restore(self, before: Tensor, made: Sequence[Reduction | None], after: Tensor) -> Tensor:
        """Hidden states with all rows, from those at the cut and those that came of them."""

    @abstractmethod
    def follow(self, kwargs: Keywords) -> Keywords:
        """What goes with the rows into a block, as they are now."""

    @abstractmethod
    def prepare_bias(self, length: int) -> None:
        """Set `bias` for an attention over `length` rows."""

    @abstractmethod
    def of_group(self, group: Alike, values: Tensor) -> Tensor:
        """Values of the encoder's rows as those of a group's: (B, n, ...)."""

    @abstractmethod
    def spread_rows(self, values: Tensor, cuts: int) -> Tensor:
        """Values of the encoder's rows behind some cuts as those of all patches: of a merged row in
        the place of each patch in it, zeros where a patch was dropped."""

    @abstractmethod
    def spread_tokens(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """What the projector made of the rows alive: the tokens of all patches, spread like that;
        and per picture, those of rows that stand for no patch (R, D)."""

    def spread_at(self, values: Tensor, block: int | None) -> Tensor:
        """`spread_rows` of values at the attention of a block; None: behind the last that is
        read."""
        if block is None:
            return values if self.restored else self.spread_rows(values, len(self.cuts))
        return self.spread_rows(values, sum(c.depth <= (block, False) for c in self.cuts))

    def passed(self) -> None:
        """The rows are those that were decided on."""
        for group in self.groups:
            group.passed()
        self.made += 1
        self.recording = Recording()  # every cut reads its own block

    def _ask(
        self,
        cut: BlockCut,
        group: Alike,
        chosen: Tensor | None,
        keep: int,
        heard: Mapping[Signal, Tensor],
    ) -> Reduction:
        device = group.place.device  # of a sharded encoder, blocks may be elsewhere
        signals = {need: self.of_group(group, values).to(device) for need, values in heard.items()}
        numbers, sizes = group.numbers, group.sizes
        if chosen is not None:
            signals = {need: take(value, chosen) for need, value in signals.items()}
            numbers, sizes = take(numbers, chosen), take(sizes, chosen)
        rows = EncoderRows(
            cut=cut,
            tower=self.tower,
            grid=group.grid,
            numbers=numbers,
            sizes=sizes,
            signals=signals,
        )
        return reduce(self.method, rows, keep, debug=self._debug)
