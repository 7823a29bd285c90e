"""The passage of pictures that are one sequence, one behind the other, in merge units."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...prune.contract import Reduction
from ...prune.errors import UnsupportedFeatureError
from .passage import Keywords, Passage
from .picture import Alike


class PackedPassage(Passage):
    """Hidden states are (rows of the encoder, C). Rows stay in the order of their places, so that
    those of one window stay together, and keep the positions of what they stand for."""

    sorts = True
    _offset = 0
    """Rows of the encoder that attention has seen in this block, segment by segment."""

    _fused = 0
    """Rows whose values were merged in this block."""
    _singles: dict[int, Alike]
    """Pictures that this block has decided on, each on its own."""

    def enter(self, block: int, hidden: Tensor, kwargs: Keywords) -> tuple[Tensor, Keywords]:
        self._offset = self._fused = 0
        self._singles = {}
        return super().enter(block, hidden, kwargs)

    def shorten(self, hidden: Tensor) -> Tensor:
        units = self._units(hidden)
        rows = [group.reduced(self._own(group, units)) for group in self.groups]
        counts = [part.shape[1] for part in rows]
        return self._in_order(rows, counts).flatten(0, 1)

    def fuse(self, cut: int, value: Tensor, values: Callable[[Tensor], Tensor]) -> Tensor:
        assert self.entered is not None  # noqa: S101  (for the types)
        begin, length = self._fused, value.shape[2]
        self._fused += length
        starts = [self.unit * start for start in _starts(self.counts)]
        for group in self.groups:
            for at, picture in enumerate(group.pictures):
                first, count = starts[picture], self.unit * group.rows
                if not (begin <= first < begin + length and count):
                    continue
                one = self._singles[picture] = group.one(at)
                self.decide(cut, [one])
                if one.made is None:
                    continue
                rows = self._units(self.entered[first : first + count])[None]
                merged = values(one.reduced(rows).flatten(1, 2))
                owner = one.made.owners(group.rows)[0].to(value.device)
                patch = torch.arange(self.unit, device=value.device)
                at_row = (owner[:, None] * self.unit + patch).flatten()
                own = value[:, :, first - begin : first - begin + count]
                of_owner = merged[:, :, at_row.clamp_min(0)].where((at_row >= 0)[:, None], own)
                before, behind = first - begin, first - begin + count
                value = torch.cat([value[:, :, :before], of_owner, value[:, :, behind:]], 2)
        return value

    def gather(self) -> None:
        for group in self.groups:
            made = [self._singles[p].made for p in group.pictures if p in self._singles]
            found = [one for one in made if one is not None]
            group.made = Reduction.together(found) if found else None
        self._singles = {}

    def restore(self, before: Tensor, made: Sequence[Reduction | None], after: Tensor) -> Tensor:
        raise UnsupportedFeatureError(
            f"{self.method.name} restores rows, which have no place in an encoder that sees all "
            f"pictures as one sequence: use a method that removes them (tome)."
        )

    def follow(self, kwargs: Keywords) -> Keywords:
        """Boundaries of pictures and windows, and rotary tables, of the rows that are left."""
        if not self.made:
            return kwargs
        found = dict(kwargs)
        for name, change in (("cu_seqlens", self._bounds), ("position_embeddings", self._tables)):
            given = kwargs[name]
            key = (name, id(given), self.made)
            if key not in self._memo:  # which holds what it was made of: its id stays its own
                self._memo[key] = given, change(given)
            found[name] = self._memo[key][1]
        return found

    def prepare_bias(self, length: int) -> None:
        self.bias = None
        if not self.method.proportional or not self.made:
            return
        logs = self._log_sizes[self._offset : self._offset + length]
        self._offset += length
        self.bias = logs[None, None, None]

    def passed(self) -> None:
        super().passed()
        self._memo: dict[object, tuple[object, object]] = {}
        self._alive = self._in_order([g.place + self._first(g)[:, None] for g in self.groups])
        sizes = self._in_order([group.sizes for group in self.groups])
        self._log_sizes = sizes.log().repeat_interleave(self.unit)

    def of_group(self, group: Alike, values: Tensor) -> Tensor:
        return self._own(group, self._units(values[0]).float().mean(1))

    def spread_rows(self, values: Tensor, cuts: int) -> Tensor:
        alive = sum(self._rows(group, cuts) * len(group.pictures) for group in self.groups)
        # One value a unit where the encoder has merged its patches itself.
        units = values[0].unflatten(0, (alive, -1))
        return (self._spread(units, cuts) if cuts else units).flatten(0, 1)[None]

    def spread_tokens(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        none = [tokens.new_zeros(0, tokens.shape[-1])] * self.num_pictures
        return (self._spread(tokens, self.made) if self.made else tokens), none

    def _spread(self, units: Tensor, cuts: int) -> Tensor:
        """Values (units alive, ...) as those of all units."""
        counts, found = [0] * self.num_pictures, []
        for group in self.groups:
            rows = self._rows(group, cuts)
            for picture in group.pictures:
                counts[picture] = rows
        starts = _starts(counts)
        nothing = len(units)
        for group in self.groups:
            first = torch.tensor([starts[p] for p in group.pictures], device=group.place.device)
            member = group.members[cuts]
            found.append((member + first[:, None]).where(member >= 0, nothing))
        index = self._in_order(found, [group.total for group in self.groups])
        return pad(units, (0, 0) * (units.dim() - 1) + (0, 1))[index.to(units.device)]

    def _rows(self, group: Alike, cuts: int) -> int:
        """Of each picture of a group, behind some cuts."""
        if group.counts is None or not cuts:
            return group.total
        return int(group.counts[cuts - 1])

    def _units(self, values: Tensor) -> Tensor:
        """(units, patches of a unit, ...)"""
        return values.unflatten(0, (-1, self.unit))

    def _own(self, group: Alike, units: Tensor) -> Tensor:
        """Those of a group: (B, n, ...)."""
        if len(group.pictures) == self.num_pictures:
            return units.unflatten(0, (len(group.pictures), group.rows))
        starts = _starts(self.counts)
        first = torch.tensor([starts[picture] for picture in group.pictures], device=units.device)
        return units[first[:, None] + torch.arange(group.rows, device=units.device)]

    def _in_order(self, parts: Sequence[Tensor], counts: Sequence[int] | None = None) -> Tensor:
        """Parts (B, n, ...) of groups as one sequence in the order of the pictures."""
        flat = torch.cat([part.flatten(0, 1) for part in parts])
        if len(parts) == 1:
            return flat
        counts = [part.shape[1] for part in parts] if counts is None else counts
        of_picture = [0] * self.num_pictures
        for group, count in zip(self.groups, counts, strict=True):
            for picture in group.pictures:
                of_picture[picture] = count
        starts = _starts(of_picture)
        places: list[int] = []
        for group, count in zip(self.groups, counts, strict=True):
            for picture in group.pictures:
                places += range(starts[picture], starts[picture] + count)
        order = torch.tensor(places, device=flat.device).argsort()
        return flat[order]

    def _first(self, group: Alike) -> Tensor:
        """(B,) the first unit of each picture, before any cut."""
        totals = [0] * self.num_pictures
        for one in self.groups:
            for picture in one.pictures:
                totals[picture] = one.total
        starts = _starts(totals)
        return torch.tensor([starts[p] for p in group.pictures], device=group.place.device)

    def _bounds(self, given: Tensor) -> Tensor:
        """Cumulative lengths of what is left of segments; segments of which nothing is are gone."""
        total = sum(group.total * len(group.pictures) for group in self.groups)
        alive = self._alive.to(given.device)
        mark = torch.zeros(total, dtype=given.dtype, device=given.device).index_fill(0, alive, 1)
        before = pad(mark.cumsum(0, dtype=given.dtype), (1, 0))
        return before[given.long() // self.unit].unique_consecutive() * self.unit

    def _tables(self, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(
            self._units(table)[self._alive.to(table.device)].flatten(0, 1) for table in given
        )


def _starts(counts: Sequence[int]) -> list[int]:
    """Where each of some runs begins."""
    found, start = [], 0
    for count in counts:
        found.append(start)
        start += count
    return found
