"""Images, budgets and signals -> what is kept: asked by a patched model and by serving engines.

Nothing here knows a model: tensors and sizes in, numbers of tokens out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .budget import MethodCall, Stage, plan
from .contract import Choosing, ModelShape, Place, Selection, Signal, VisualTokens
from .errors import VlmpruneError
from .joining import composed, renumbered
from .select import select_all
from .tiling import Tiling


@dataclass(frozen=True)
class ChosenImage:
    """One image (or video) with its cuts, and the rows that enter the LLM."""

    tiling: Tiling
    calls: tuple[MethodCall, ...]
    """The methods, with the counts that they found where they find their own."""
    plan: tuple[Stage, ...]
    """The cuts, as those of the last image of a prompt: others may have some of them alone."""
    slots: Tensor
    """(K,) ascending: places among the image's N tokens that the rows take, one each."""
    selection: Selection
    encoded: Selection | None = None
    """What a method in the vision encoder left; None: everything."""

    @property
    def num_tokens(self) -> int:
        """N"""
        return self.tiling.num_tokens

    @property
    def as_is(self) -> bool:
        """Whether the rows are tokens of the image, unchanged and in its order."""
        return self.selection.order is None and self.selection.features is None

    @property
    def sources(self) -> Tensor:
        """(K,) the token whose position each row has: its own, else that of its slot."""
        order = self.selection.order
        return self.slots if order is None else order.where(order >= 0, self.slots)

    def to(self, device: torch.device) -> ChosenImage:
        """The same on another device."""
        if self.slots.device == device:
            return self
        return replace(
            self,
            slots=self.slots.to(device),
            selection=_moved(self.selection, device),
            encoded=None if self.encoded is None else _moved(self.encoded, device),
        )

    def emit(self, features: Tensor, project: Callable[[Tensor], Tensor]) -> Tensor:
        """The image's features (N, D) with the rows that enter the LLM in their slots.

        Args:
            project: the selection's own features (R, C), of the encoder, as the LLM sees them.
        """
        if self.as_is:
            return features
        rows, own = features[self.sources], self.selection.features
        if own is not None:
            projected = own if self.selection.projected else project(own.to(features.dtype))
            everywhere = torch.arange(len(rows), device=rows.device)
            at = everywhere if self.selection.rows is None else self.selection.rows
            rows = rows.index_copy(0, at, projected.to(rows))
        return features.index_copy(0, self.slots, rows)


def choose_images(
    shape: ModelShape,
    tilings: Sequence[Tiling],
    signals: Sequence[Mapping[Signal, Tensor]],
    calls: Sequence[tuple[MethodCall, ...]],
    device: torch.device,
    *,
    encoded: Sequence[Selection | None] | None = None,
    record: bool = False,
    debug: bool = False,
    timed: AbstractContextManager[object] | None = None,
) -> list[ChosenImage]:
    """Plan every image's cuts, and make the choice before the LLM, once per image.

    Args:
        shape: sizes of the model.
        tilings: how the tokens of each image lie.
        signals: per image, what the method before the LLM declared, of the tokens that it sees.
        calls: per image, the methods in order of depth with their budgets.
        device: where the choice is to be.
        encoded: per image, what a method in the vision encoder left; None: everything.
        record: keep the scores of the choice.
        debug: look at the numbers that shipped methods return, too.
        timed: what the method runs within.

    Raises:
        BudgetError: a budget cannot be reached.
        MethodAnswerError: a method returned something else than it was asked for.
    """
    images = [
        _left_by_encoder(shape, tiling, given, left, device)
        for tiling, given, left in zip(
            tilings, calls, encoded or [None] * len(tilings), strict=True
        )
    ]
    firsts = [next((s for s in one.plan if s.place is Place.BEFORE_LLM), None) for one in images]
    tokens = [
        VisualTokens(
            num_tokens=image.selection.count,
            tiling=image.tiling,
            shape=shape,
            signals=seen,
            alive=None if image.selection.count == image.num_tokens else image.selection.kept,
        )
        for image, seen, first in zip(images, signals, firsts, strict=True)
        if first is not None
    ]
    asked = [first for first in firsts if first is not None]
    with timed or nullcontext():
        made = iter(choose(asked, tokens, device, record=record, debug=debug))
    return [
        image if first is None else _chosen(shape, image, first, next(made))
        for image, first in zip(images, firsts, strict=True)
    ]


def _left_by_encoder(
    shape: ModelShape,
    tiling: Tiling,
    calls: tuple[MethodCall, ...],
    left: Selection | None,
    device: torch.device,
) -> ChosenImage:
    """An image as it leaves the vision encoder."""
    total = tiling.num_tokens
    selection = Selection(kept=torch.arange(total, device=device)) if left is None else left
    if left is not None:
        calls = _found(calls, Place.ENCODER, left.count)
    return ChosenImage(
        tiling, calls, plan(total, calls, shape), slots_of(selection, total), selection, left
    )


def _chosen(shape: ModelShape, image: ChosenImage, stage: Stage, chosen: Selection) -> ChosenImage:
    """The image behind the choice before the LLM, of the rows that it had."""
    calls, stages, total = image.calls, image.plan, image.num_tokens
    if stage.adaptive:
        calls = _found(calls, Place.BEFORE_LLM, max(1, chosen.count))
        stages = plan(total, calls, shape)
    before = image.selection
    if chosen.count == before.count:
        return replace(image, calls=calls, plan=stages)
    if before.count < total:
        groups = composed(chosen, before.arranged, before.groups)
        chosen = replace(renumbered(chosen, before.kept, total), groups=groups)
    slots = slots_of(chosen, total)
    return replace(image, calls=calls, plan=stages, slots=slots, selection=chosen)


def _found(calls: tuple[MethodCall, ...], place: Place, count: int) -> tuple[MethodCall, ...]:
    """The methods, that of a place with the count that it found."""
    return tuple(
        replace(call, found=count) if call.method.place is place else call for call in calls
    )


def choose(
    stages: Sequence[Stage],
    images: Sequence[VisualTokens],
    device: torch.device,
    *,
    record: bool = False,
    debug: bool = False,
) -> list[Selection]:
    """What stages of one method keep of an image each, in one pass, on `device`; with their scores
    (N,) float32 where these are recorded.

    Nothing learns through scores. Rows that are merged do carry gradients: where one is wanted,
    the method is asked again for them, as choices are pure.
    """
    if not stages:
        return []
    method = stages[0].call.method
    if not isinstance(method, Choosing):
        raise VlmpruneError(f"{method.name} removes nothing from the sequence.")
    keeps = [None if stage.adaptive else stage.keep for stage in stages]
    given = [replace(one, signals=_detached(one.signals)) for one in images]
    # Scores are float32 whatever autocast the caller is in.
    with torch.autocast(device.type, enabled=False):
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


def slots_of(chosen: Selection, num_tokens: int) -> Tensor:
    """Places for the rows (K,) among `num_tokens`, ascending: those of the kept tokens and, for
    rows that stand for no token, the first ones that are free."""
    extra = chosen.count - len(chosen.kept)
    if not extra:
        return chosen.kept
    taken = torch.zeros(num_tokens, dtype=torch.uint8, device=chosen.kept.device)
    free = taken.index_fill(0, chosen.kept, 1).argsort(stable=True)[:extra]
    return torch.cat([chosen.kept, free]).sort().values


def _moved(chosen: Selection, device: torch.device) -> Selection:
    order, groups, scores = chosen.order, chosen.groups, chosen.scores
    return replace(
        chosen,
        kept=chosen.kept.to(device),
        order=None if order is None else order.to(device),
        groups=None if groups is None else groups.to(device),
        scores=None if scores is None else scores.to(device),
    )


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
