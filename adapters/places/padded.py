"""The passage of pictures that are a batch: as long as the longest, the others filled up."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...prune.contract import Reduction
from ...prune.contract.reduction import take
from .passage import Keywords, Passage
from .picture import Alike


class PaddedPassage(Passage):
    """Hidden states are (B, prefix + n, C); rows that only fill up have size 0."""

    def shorten(self, hidden: Tensor) -> Tensor:
        rows = [group.reduced(self.of_group(group, hidden)) for group in self.groups]
        return self._behind_prefix(hidden, rows)

    def fuse(self, cut: int, value: Tensor, values: Callable[[Tensor], Tensor]) -> Tensor:
        self.decide(cut)
        if not self.leaves:
            return value
        assert self.entered is not None  # noqa: S101  (for the types)
        merged = values(self.shorten(self.entered))
        owner = self.owners(value.shape[2]).to(value.device)
        at = owner[:, None, :, None].expand_as(value)
        return merged.gather(2, at.clamp_min(0)).where(at >= 0, value)

    def restore(self, before: Tensor, made: Sequence[Reduction | None], after: Tensor) -> Tensor:
        rows = []
        for group, done in zip(self.groups, made, strict=True):
            short = self.of_group(group, after)
            if done is not None:
                whole = self._own(group, before)[:, self.prefix :]
                short = self.method.restore(whole, short, done.to(short.device))
            rows.append(short)
        return self._behind_prefix(after, rows)

    def follow(self, kwargs: Keywords) -> Keywords:
        return kwargs

    def prepare_bias(self, length: int) -> None:
        if self.bias is not None and self.bias.shape[-1] == length:
            return  # of an earlier block with as many rows: sizes change with cuts alone
        ragged = any(group.rows != length - self.prefix for group in self.groups)
        merged = self.method.proportional and self.made > 0
        self.bias = None
        if not ragged and not merged:
            return
        logs = []
        for group in self.groups:
            sizes = group.sizes if merged else torch.ones_like(group.sizes)
            if not group.rows + self.prefix:  # a row of no picture: it attends to itself
                sizes = sizes.new_ones(len(sizes), 1)
            logs.append(pad(sizes, (0, length - self.prefix - sizes.shape[1])).log())
        self.bias = pad(self._in_order(logs), (self.prefix, 0))[:, None, None]

    def passed(self) -> None:
        super().passed()
        self.bias = None

    def of_group(self, group: Alike, values: Tensor) -> Tensor:
        own = self._own(group, values)
        return own[:, self.prefix : self.prefix + group.rows]

    @property
    def places(self) -> Tensor:
        """(B, K) the place that each row stands for; 0 for rows that fill up or stand for none."""
        longest = max(group.rows for group in self.groups)
        own = [pad(g.place.clamp_min(0), (0, longest - g.rows)) for g in self.groups]
        return self._in_order(own)

    def owners(self, length: int) -> Tensor:
        """(B, length): the row of the shortened batch that each row goes into, as decided; -1 where
        it is dropped."""
        found = []
        for group in self.groups:
            rows = torch.arange(group.rows, device=group.place.device)
            owner = rows.expand(len(group.pictures), -1)
            owner = owner if group.made is None else group.made.owners(group.rows)
            filled = length - self.prefix - group.rows
            found.append(pad((owner + self.prefix).where(owner >= 0, -1), (0, filled), value=-1))
        prefix = torch.arange(self.prefix, device=found[0].device)
        rows = self._in_order(found)
        return torch.cat([prefix.expand(len(rows), -1), rows], 1)

    def spread_rows(self, values: Tensor, cuts: int) -> Tensor:
        if not cuts:
            return values
        spread = self._spread(values[:, self.prefix :], cuts)
        return torch.cat([values[:, : self.prefix], spread], 1)

    def spread_tokens(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        none = [tokens.new_zeros(0, tokens.shape[-1])] * self.num_pictures
        if self.restored or not self.made:
            return tokens, none
        # Rows in front of the patches, where the projector reads these too.
        count = min(self.prefix, tokens.shape[1] - max(group.rows for group in self.groups))
        front, tokens = tokens[:, :count], tokens[:, count:]
        extra = list(none)
        for group in self.groups:
            if self.method.fuses(self.tower) and group.rows:
                for number, place in zip(group.pictures, group.place, strict=True):
                    extra[number] = tokens[number, : group.rows][place < 0]
        return torch.cat([front, self._spread(tokens, self.made)], 1), extra

    def _spread(self, values: Tensor, cuts: int) -> Tensor:
        """Values (B, n, ...) without prefix: (B, N, ...)."""
        found = []
        for group in self.groups:
            rows = self._own(group, values)
            member = group.members[cuts].to(rows.device)
            rows = pad(rows, (0, 0) * (rows.dim() - 2) + (0, 1))  # a last row of zeros
            found.append(take(rows, member.where(member >= 0, rows.shape[1] - 1)))
        return self._in_order(found)

    def _behind_prefix(self, hidden: Tensor, rows: Sequence[Tensor]) -> Tensor:
        longest = max(part.shape[1] for part in rows)
        if not longest + self.prefix:
            longest = 1
        filled = [pad(part, (0, 0, 0, longest - part.shape[1])) for part in rows]
        together = self._in_order(filled)
        return torch.cat([hidden[:, : self.prefix], together], 1) if self.prefix else together

    def _own(self, group: Alike, values: Tensor) -> Tensor:
        return values if len(self.groups) == 1 else values[group.index.to(values.device)]

    def _in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Parts of groups as those of all pictures."""
        if len(parts) == 1:
            return parts[0]
        order = torch.cat([group.index for group in self.groups]).argsort()
        return torch.cat(list(parts))[order.to(parts[0].device)]
