"""Rows of pictures on their way through one pass of a vision encoder, from cut to cut."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...prune.batches import alike
from ...prune.contract import BlockCut, BlockInput, EncoderRows, InEncoder, Reduction, Signal, Tower
from ...prune.contract.reduction import take
from ...prune.reductions import reduce
from ..signals.recording import Recording
from ..stopwatch import Stopwatch

Keywords = dict[str, Any]


@dataclass(frozen=True)
class Picture:
    """One picture (tile, frame) as it enters the encoder, and what is to become of it. Its N
    patches (or merge units) are numbered by their places in the encoder's order."""

    total: int
    """N"""
    grid: tuple[int, int]
    counts: tuple[int, ...] | None
    """Rows alive after each cut; None: nothing leaves."""
    present: Tensor | None = None
    """(P,) ascending: the places that reach the prompt, as far as rows leave; None: all."""
    raster: Tensor | None = None
    """(N,) the number in raster order of each place; None: its own."""

    @property
    def kind(self) -> tuple[object, ...]:
        """Pictures of one kind are reduced together."""
        left = None if self.present is None else len(self.present)
        return self.total, self.grid, left, self.counts


@dataclass
class Alike:
    """B pictures of one kind, with n rows each, from cut to cut."""

    pictures: Sequence[int]
    """Their numbers, ascending."""
    total: int
    grid: tuple[int, int]
    counts: tuple[int, ...] | None
    present: Tensor | None
    """(B, P) the places that reach the prompt; None: all."""
    raster: Tensor
    """(B, N)"""
    place: Tensor
    """(B, n) the place that each row stands for, -1 for none."""
    sizes: Tensor
    """(B, n) float32: patches in each row."""
    members: list[Tensor]
    """(B, N) after 0, 1, ... cuts: the row that each place is in, -1 where it was dropped."""
    made: Reduction | None = None
    """What was decided at the cut that is made next; None: nothing leaves."""
    merged: bool = False
    """Whether rows were merged."""

    @classmethod
    def of(cls, pictures: Sequence[Picture], numbers: Sequence[int], device: torch.device) -> Alike:
        own = [pictures[number] for number in numbers]
        first = own[0]
        places = torch.arange(first.total, device=device).expand(len(own), -1)
        raster, present = places, None
        if first.raster is not None:
            raster = torch.stack([one.raster for one in own if one.raster is not None]).to(device)
        if first.present is not None:
            present = torch.stack([one.present for one in own if one.present is not None])
        return cls(
            pictures=numbers,
            total=first.total,
            grid=first.grid,
            counts=first.counts,
            present=None if present is None else present.to(device),
            raster=raster,
            place=places,
            sizes=torch.ones(len(own), first.total, device=device),
            members=[places],
        )

    @cached_property
    def index(self) -> Tensor:
        """(B,) their numbers."""
        return torch.tensor(self.pictures, device=self.place.device)

    @property
    def rows(self) -> int:
        """n"""
        return self.place.shape[1]

    @property
    def numbers(self) -> Tensor:
        """(B, n) the number in raster order of each row, -1 for none."""
        return self.raster.gather(1, self.place.clamp_min(0)).where(self.place >= 0, -1)

    def decide(
        self, cut: int, ask: Callable[[Alike, Tensor | None, int], Reduction], in_order: bool
    ) -> None:
        """Find what becomes of the rows.

        Args:
            cut: its number.
            ask: what becomes of the rows (of some, (B, P)), of which a count is to stay.
            in_order: whether rows stay in the order of their places.
        """
        self.made = None
        if self.counts is None:
            return
        keep, chosen = self.counts[cut], self.present if cut == 0 else None
        count = self.rows if chosen is None else chosen.shape[1]
        if keep == self.rows:
            return
        if keep in (0, count):
            everything = torch.arange(self.rows, device=self.place.device)
            kept = everything.expand(len(self.place), -1) if chosen is None else chosen
            self.made = Reduction(source=kept[:, :keep])
            return
        made = ask(self, chosen, keep)
        made = made if chosen is None else made.among(chosen, self.rows)
        self.made = made.in_order(self.place.gather(1, made.source)) if in_order else made

    def left(self, at: int) -> tuple[Tensor, Tensor]:
        """Of its picture number `at`: the place of each row that is left for the prompt (K,), and
        the row that each place is in (N,), -1 for none."""
        place, member = self.place[at], self.members[-1][at]
        if self.counts is not None or self.present is None:
            return place, member
        place = self.present[at]  # nothing left in the encoder
        rows = torch.arange(len(place), device=place.device)
        return place, member.new_full(member.shape, -1).scatter(0, place, rows)

    def one(self, at: int) -> Alike:
        """Its picture number `at` alone, as it is now."""
        own = slice(at, at + 1)
        return Alike(
            pictures=self.pictures[own],
            total=self.total,
            grid=self.grid,
            counts=self.counts,
            present=None if self.present is None else self.present[own],
            raster=self.raster[own],
            place=self.place[own],
            sizes=self.sizes[own],
            members=[],
        )

    def reduced(self, rows: Tensor) -> Tensor:
        """Rows (B, n, ...) as decided."""
        return rows if self.made is None else self.made.to(rows.device).apply(rows)

    def passed(self) -> None:
        """The rows are those that were decided on."""
        member, made = self.members[-1], self.made
        if made is not None:
            owner = made.owners(self.rows)
            self.sizes = made.sizes(self.sizes)
            place = self.place.gather(1, made.source.clamp_min(0))
            self.place = place.where(made.source >= 0, -1)
            member = owner.gather(1, member.clamp_min(0)).where(member >= 0, -1)
            self.merged |= made.owner is not None
            self.made = None
        self.members.append(member)


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
