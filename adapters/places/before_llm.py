"""From the vision encoder's output to a choice per image: counts, selection, emitted rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...prune.budget import Budget, MethodCall, Stage, plan
from ...prune.contract import Features, Place, Pruning, Selection, Signal, VisualTokens
from ...prune.errors import MissingSignalError, VlmpruneError
from ...prune.select import select_all
from ...prune.tiling import Tiling
from ..patch_setup import Setup
from ..report import Stopwatch


@dataclass(frozen=True)
class EncodedImage:
    """One image with its cuts, and the rows that enter the LLM."""

    tiling: Tiling
    calls: tuple[MethodCall, ...]
    """The methods, the first with the count that it found, where it finds its own."""
    plan: tuple[Stage, ...]
    """The cuts of the last image of a prompt; `placed` plans anew for those before it."""
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
        chosen = self.selection
        order, groups, scores = chosen.order, chosen.groups, chosen.scores
        chosen = replace(
            chosen,
            kept=chosen.kept.to(device),
            order=None if order is None else order.to(device),
            groups=None if groups is None else groups.to(device),
            scores=None if scores is None else scores.to(device),
        )
        return replace(self, slots=self.slots.to(device), selection=chosen)

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
    setup: Setup
    """What they were encoded with, and enter the LLM with."""


def encode(
    setup: Setup,
    tilings: Sequence[Tiling],
    signals: Sequence[Mapping[Signal, Tensor]],
    device: torch.device,
    numbers: Sequence[int] | None = None,
) -> Encoded:
    """Count and choose for every image; the choice before the LLM is made here, once per image.

    Args:
        tilings: how the tokens of each image lie.
        numbers: those of the images in the call; None: from 0 on.
        signals: per image, what the method before the LLM declared.
    """
    stopwatch = Stopwatch(device)
    given = setup.calls_of(range(len(tilings)) if numbers is None else numbers)
    plans = [
        plan(tiling.num_tokens, calls, setup.shape)
        for tiling, calls in zip(tilings, given, strict=True)
    ]
    first = [next((s for s in stages if s.place is Place.BEFORE_LLM), None) for stages in plans]
    tokens = [
        VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=setup.shape, signals=seen)
        for tiling, seen, stage in zip(tilings, signals, first, strict=True)
        if stage is not None
    ]
    stages_now = [stage for stage in first if stage is not None]
    made = iter(
        choose_all(stages_now, tokens, stopwatch, device, record=setup.record, debug=setup.debug)
    )
    images = []
    for tiling, calls, stages, stage in zip(tilings, given, plans, first, strict=True):
        everything = torch.arange(tiling.num_tokens, device=device)
        slots, selection = everything, Selection(kept=everything)
        if stage is not None:
            chosen = next(made)
            if stage.adaptive:
                found = Budget("keep_tokens", max(1, chosen.count))
                calls = (replace(calls[0], budget=found), *calls[1:])
                stages = plan(tiling.num_tokens, calls, setup.shape)
            if chosen.count < tiling.num_tokens:
                slots, selection = slots_of(chosen, tiling.num_tokens), chosen
        images.append(EncodedImage(tiling, calls, stages, slots, selection))
    return Encoded(images, stopwatch, setup)


def choose(
    stage: Stage,
    tokens: VisualTokens,
    stopwatch: Stopwatch,
    device: torch.device,
    *,
    record: bool = False,
    debug: bool = False,
) -> Selection:
    """What `stage` keeps of `tokens`, whose signals are on `device`."""
    return choose_all([stage], [tokens], stopwatch, device, record=record, debug=debug)[0]


def choose_all(
    stages: Sequence[Stage],
    images: Sequence[VisualTokens],
    stopwatch: Stopwatch,
    device: torch.device,
    *,
    record: bool = False,
    debug: bool = False,
) -> list[Selection]:
    """What stages of one method keep of an image each, in one pass; with their scores (N,) float32
    where these are recorded.

    Nothing learns through scores. Rows that are merged do carry gradients: where one is wanted,
    the method is asked again for them, as choices are pure.
    """
    if not stages:
        return []
    method = stages[0].call.method
    if not isinstance(method, Pruning):
        raise VlmpruneError(f"{method.name} removes nothing from the sequence.")
    keeps = [None if stage.adaptive else stage.keep for stage in stages]
    given = [replace(one, signals=_detached(one.signals)) for one in images]
    # Scores are float32 whatever autocast the caller is in.
    with stopwatch, torch.autocast(device.type, enabled=False):
        with torch.no_grad():
            found = select_all(method, given, keeps, record=record, debug=debug)
        if any(chosen.features is not None for chosen in found) and _learns(images):
            found = select_all(method, images, keeps, record=record, debug=debug)
    # A method that reads nothing chooses on the CPU.
    return [
        replace(
            chosen,
            kept=chosen.kept.to(device),
            order=None if chosen.order is None else chosen.order.to(device),
            scores=None if chosen.scores is None else _noted(chosen.scores, device),
        )
        for chosen in found
    ]


def _noted(scores: Tensor, device: torch.device) -> Tensor:
    """A copy: a view would hold the whole batch in memory."""
    return scores.detach().to(device, torch.float32, copy=True)


def _detached(signals: Mapping[Signal, Tensor]) -> dict[Signal, Tensor]:
    return {signal: value.detach() for signal, value in signals.items()}


def _learns(images: Sequence[VisualTokens]) -> bool:
    """Whether rows that are merged of these need gradients."""
    return torch.is_grad_enabled() and any(
        value.requires_grad for tokens in images for value in tokens.signals.values()
    )


def slots_of(chosen: Selection, num_tokens: int) -> Tensor:
    """Places for the rows (K,) among `num_tokens`, ascending: those of the kept tokens and, for
    rows that stand for no token, the first ones that are free."""
    extra = chosen.count - len(chosen.kept)
    if not extra:
        return chosen.kept
    taken = torch.zeros(num_tokens, dtype=torch.uint8, device=chosen.kept.device)
    free = taken.index_fill(0, chosen.kept, 1).argsort(stable=True)[:extra]
    return torch.cat([chosen.kept, free]).sort().values


def encode_merged(setup: Setup, embeds: Tensor, visual: Tensor) -> Encoded:
    """Images that the caller merged into `embeds` (B, L, D) itself, at the columns `visual`.

    Each run of visual tokens counts as one image of a single row.
    """
    signals, tilings = [], []
    for row, marks in zip(embeds, visual.tolist(), strict=True):
        start = None
        for column, mark in enumerate([*marks, False]):
            if mark and start is None:
                start = column
            elif not mark and start is not None:
                signals.append(_merged_signals(setup.read, row[start:column]))
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
