"""From the vision encoder's output to a choice per image: counts, selection, emitted rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..prune.budget import Budget, Stage, plan
from ..prune.contract import Features, Selection, Signal, VisualTokens
from ..prune.errors import MissingSignalError
from ..prune.select import select
from ..prune.tiling import Tiling
from .cache import Ticket
from .report import Stopwatch
from .setup import Setup


@dataclass(frozen=True)
class EncodedImage:
    """One image with its cuts, and the rows that enter the LLM."""

    tiling: Tiling
    plan: tuple[Stage, ...]
    slots: Tensor
    """(K,) ascending: placeholders of the prompt that the rows take, one each."""
    selection: Selection

    @property
    def num_tokens(self) -> int:
        return self.tiling.num_tokens

    @property
    def as_is(self) -> bool:
        """Whether the rows are tokens of the image, unchanged and in its order."""
        return self.selection.order is None and self.selection.features is None

    @property
    def sources(self) -> Tensor:
        """(K,) the placeholder whose position each row has: its token's, else its own slot's."""
        order = self.selection.order
        return self.slots if order is None else order.where(order >= 0, self.slots)

    def to(self, device: torch.device) -> EncodedImage:
        """The same, where the batch is."""
        if self.slots.device == device:
            return self
        chosen, (order, groups) = self.selection, (self.selection.order, self.selection.groups)
        chosen = replace(
            chosen,
            kept=chosen.kept.to(device),
            order=None if order is None else order.to(device),
            groups=None if groups is None else groups.to(device),
        )
        return replace(self, slots=self.slots.to(device), selection=chosen)

    def rows_at(self, slots: Tensor) -> Tensor:
        """Token numbers of the rows in `slots`, in their order; -1 for rows that stand for none."""
        order = self.selection.order
        return slots if order is None else order[torch.searchsorted(self.slots, slots)]

    def tokens_at(self, slots: Tensor) -> Tensor:
        """Numbers of the tokens in `slots`, ascending."""
        if self.selection.order is None:
            return slots
        rows = self.rows_at(slots)
        return rows[rows >= 0].sort().values

    def members_at(self, slots: Tensor) -> Tensor | None:
        """(2, G) pairs of a row in `slots` (numbered among them) and a token merged into it."""
        pairs = self.selection.groups
        if pairs is None:
            return None
        place = torch.full_like(self.slots, -1)
        place[torch.searchsorted(self.slots, slots)] = torch.arange(len(slots), device=place.device)
        rows = place[pairs[0]]
        return torch.stack([rows, pairs[1]])[:, rows >= 0]

    def emit(self, features: Tensor, projected: Tensor | None) -> Tensor:
        """The image's features (N, D) with the rows that enter the LLM in their slots.

        Args:
            projected: (R, D), the selection's own features as the LLM sees them.
        """
        if self.as_is:
            return features
        rows = features[self.sources]
        if projected is not None:
            everywhere = torch.arange(len(rows), device=rows.device)
            at = everywhere if self.selection.rows is None else self.selection.rows
            rows = rows.index_copy(0, at, projected.to(rows))
        return features.index_copy(0, self.slots, rows)


@dataclass(frozen=True)
class Encoded:
    """All images (or videos) of a call, in batch order."""

    images: list[EncodedImage]
    stopwatch: Stopwatch
    owner: Ticket
    """The patch that encoded them."""


def encode(
    setup: Setup,
    tilings: Sequence[Tiling],
    signals: Sequence[Mapping[Signal, Tensor]],
    device: torch.device,
) -> Encoded:
    """Count and choose for every image; the choice before the LLM is made here, once per image.

    Args:
        tilings: how the tokens of each image lie.
        signals: per image, what the method before the LLM declared.
    """
    stopwatch = Stopwatch(device)
    images = []
    for tiling, seen in zip(tilings, signals, strict=True):
        stages = plan(tiling.num_tokens, setup.calls, setup.shape)
        everything = torch.arange(tiling.num_tokens, device=device)
        slots, selection = everything, Selection(kept=everything)
        if stages and stages[0].layer == 0:
            tokens = VisualTokens(
                num_tokens=tiling.num_tokens, tiling=tiling, shape=setup.shape, signals=seen
            )
            chosen = choose(stages[0], tokens, stopwatch)
            if stages[0].adaptive:
                stages = _replan(setup, tiling.num_tokens, chosen.count)
            if chosen.count < tiling.num_tokens:
                slots, selection = _slots(chosen, tiling.num_tokens), chosen
        images.append(EncodedImage(tiling, stages, slots, selection))
    return Encoded(images, stopwatch, setup.ticket)


@torch.no_grad()
def choose(stage: Stage, tokens: VisualTokens, stopwatch: Stopwatch) -> Selection:
    """What `stage` keeps of `tokens`, on the device that they are on."""
    device = stopwatch.device
    # Scores are float32 whatever autocast the caller is in.
    with stopwatch, torch.autocast(device.type, enabled=False):
        chosen = select(stage.call.method, tokens, None if stage.adaptive else stage.keep)
    # A method that reads nothing chooses on the CPU.
    order = None if chosen.order is None else chosen.order.to(device)
    return replace(chosen, kept=chosen.kept.to(device), order=order)


def _replan(setup: Setup, num_tokens: int, found: int) -> tuple[Stage, ...]:
    """The plan once the first method has found its own count."""
    first, *rest = setup.calls
    budget = Budget("keep_tokens", max(1, found))
    return plan(num_tokens, [replace(first, budget=budget), *rest], setup.shape)


def _slots(chosen: Selection, num_tokens: int) -> Tensor:
    """Placeholders for the rows (K,), ascending: those of the kept tokens and, for rows that stand
    for no token, the first ones that are free."""
    extra = chosen.count - len(chosen.kept)
    if not extra:
        return chosen.kept
    taken = torch.zeros(num_tokens, dtype=torch.uint8, device=chosen.kept.device)
    free = taken.index_fill(0, chosen.kept, 1).argsort(stable=True)[:extra]
    return torch.cat([chosen.kept, free]).sort().values


def encode_merged(setup: Setup, needs: Sequence[Signal], embeds: Tensor, visual: Tensor) -> Encoded:
    """Images that the caller merged into `embeds` (B, L, D) itself, at the columns `visual`.

    Each run of visual tokens counts as one image of a single row.
    """
    signals, tilings = [], []
    for row, marks in zip(embeds.detach(), visual.tolist(), strict=True):
        start = None
        for column, mark in enumerate([*marks, False]):
            if mark and start is None:
                start = column
            elif not mark and start is not None:
                signals.append(_merged_signals(needs, row[start:column]))
                tilings.append(Tiling.single(1, column - start))
                start = None
    return encode(setup, tilings, signals, embeds.device)


def _merged_signals(needs: Sequence[Signal], features: Tensor) -> dict[Signal, Tensor]:
    """Signals of visual tokens that the caller merged into `inputs_embeds`: features only."""
    for need in needs:
        if not isinstance(need, Features):
            raise MissingSignalError(
                f"{need} cannot be read from inputs_embeds with visual_mask: give input_ids and "
                f"pixel_values, or use a method that needs features only (divprune)."
            )
    return dict.fromkeys(needs, features)
