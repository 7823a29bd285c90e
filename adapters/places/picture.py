"""Pictures on their way through an encoder: those of one kind, with as many rows each, together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...prune.contract import Reduction


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
