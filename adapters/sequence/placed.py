"""An image in its prompt: which placeholders its rows take while the decoder runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...prune.budget import Stage
from ...prune.choose import ChosenImage, slots_of
from ...prune.contract import Place, Selection, Signal
from ...prune.joining import composed
from ..stopwatch import Stopwatch
from .layout import by_token


@dataclass
class PlacedImage:
    """An image or video in the batch.

    It has K rows in the current layer, each in a slot: the number of one of its N placeholders.
    """

    encoded: ChosenImage
    sample: int
    row: int
    """The row of the batch that stands for the sample."""
    rows: Tensor
    """Rows of the batch that hold its sample (several under beam search)."""
    columns: Tensor
    """Columns of its placeholders in the caller's sequence, (N,)."""
    stopwatch: Stopwatch
    plan: tuple[Stage, ...]
    """Its cuts; those that were made have the count that was found."""
    slots: Tensor
    """(K,) ascending."""
    order: Tensor | None
    """(K,) the token that each row is, -1 for rows that stand for none; None: that of its slot."""
    members: Tensor | None
    """(2, G) pairs of a row and a token merged into it, sorted by row; None: nothing merged."""
    signals: dict[Signal, Tensor] = field(default_factory=dict)
    """What was read for the method's next choice: per row, or for the whole image."""

    @property
    def row_tokens(self) -> Tensor:
        """(K,) the token that each row is, -1 for none."""
        return self.slots if self.order is None else self.order

    @property
    def tokens(self) -> Tensor:
        """Numbers of the tokens alive, ascending."""
        if self.order is None:
            return self.slots
        return self.order[self.order >= 0].sort().values

    def scored(self, scores: Tensor | None) -> Tensor | None:
        """Scores of the rows (K,) as those of the tokens (N,), NaN for those that are gone."""
        if scores is None:
            return None
        return by_token(scores, self.row_tokens, self.encoded.num_tokens)

    def entries(self, keep: Tensor) -> tuple[Tensor, Tensor]:
        """For each row, its number among the prompt's columns that are in `keep` (B, L), and its
        token, -1 for none: (K,) int64 each."""
        number = keep[self.row].cumsum(0) - 1
        return number[self.columns[self.slots]], self.row_tokens

    def hear(self, need: Signal, value: Tensor) -> None:
        """Note a signal; choices are made where the batch is, whatever device a layer is on."""
        self.signals[need] = value.to(self.slots.device)

    def mark(self, keep: Tensor) -> None:
        """Make exactly this image's slots survive in `keep` (B, L), in place."""
        rows = self.rows[:, None]
        keep[rows, self.columns] = False
        keep[rows, self.columns[self.slots]] = True

    def apply(self, chosen: Selection) -> tuple[Tensor, Tensor] | None:
        """Keep what was chosen of the K rows.

        Returns:
            the columns of the caller's sequence that rows leave and that they enter, (K',) each;
            None where every row stays in its place.
        """
        before = self.slots
        tokens = self.row_tokens
        if chosen.order is None:
            self.slots = before[chosen.kept]
            self.order = None if self.order is None else self.order[chosen.kept]
        else:
            taken = chosen.order >= 0
            source = chosen.order.clamp_min(0)
            self.slots = before[slots_of(chosen, len(before))]
            self.order = torch.where(taken, tokens[source], -1)
        self.members = composed(chosen, tokens, self.members)
        rows = chosen.arranged
        merged = chosen.count > len(chosen.kept)  # rows that no earlier signal describes
        self.signals = {} if merged else _taken(self.signals, rows)
        if chosen.order is None:
            return None
        left = torch.where(taken, before[source], self.slots)
        return self.columns[left], self.columns[self.slots]

    def stages(self, layer: int) -> list[Stage]:
        """Its cuts at a layer of the decoder: one at most."""
        return [stage for stage in self.plan if stage.at(Place.DECODER, layer)]

    def done(self, layer: int) -> None:
        """Note the count that was found at a cut of the decoder."""
        count = len(self.slots)
        self.plan = tuple(
            replace(stage, keep=count, adaptive=False) if stage.at(Place.DECODER, layer) else stage
            for stage in self.plan
        )


def _taken(signals: Mapping[Signal, Tensor], rows: Tensor) -> dict[Signal, Tensor]:
    return {s: v[rows] if s.per == "token" else v for s, v in signals.items()}
