"""The oracle inside the vision encoder: the same hooks and counts as a method's, and no choice.

Its time is the limit of what leaving rows out between blocks can save: the first rows of each
picture stay, as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.hooks import shadow
from ...adapters.patching import patch
from ...adapters.registry import family_of
from ...prune.budget import MethodCall
from ...prune.contract import BlockCut, EncoderRows, InEncoder, Reduction, Tower
from ...prune.shipped import PACKAGE


@dataclass(frozen=True, kw_only=True)
class Slicing(InEncoder):
    """The first rows stay, as many as another method leaves."""

    name: ClassVar[str] = "slicing"
    needs_budget: ClassVar[bool] = False
    finds_count: ClassVar[bool] = True

    like: InEncoder

    def blocks(self, tower: Tower) -> tuple[BlockCut, ...]:
        return self.like.blocks(tower)

    def block_counts(self, tower: Tower, rows: int, keep: int | None) -> tuple[int, ...]:
        return self.like.block_counts(tower, rows, keep)

    def reduce(self, rows: EncoderRows, keep: int) -> Reduction:
        first = torch.arange(keep, device=rows.device)
        return Reduction(source=first.expand(len(rows.numbers), -1))


@dataclass(frozen=True, kw_only=True)
class RestoringSlicing(Slicing):
    """And behind the last block the others are there again, as they were."""

    restores: ClassVar[bool] = True

    def restore(self, before: Tensor, after: Tensor, done: Reduction) -> Tensor:
        return torch.cat([after, before[:, after.shape[1] :]], 1)


for _kind in (Slicing, RestoringSlicing):
    _kind.__module__ = f"{PACKAGE}.{__name__}"  # its numbers need no look, as of what is shipped


def slicing(calls: Sequence[MethodCall]) -> MethodCall | None:
    """The oracle of the one of some methods that acts in the encoder; None: none does."""
    for call in calls:
        if isinstance(call.method, InEncoder):
            kind = RestoringSlicing if call.method.restores else Slicing
            return MethodCall(kind(like=call.method), call.budget)
    return None


@contextmanager
def sliced(model: PreTrainedModel, calls: Sequence[MethodCall]) -> Iterator[bool]:
    """A model whose encoder keeps the first rows where one of `calls` would remove some, and skips
    the blocks that nobody reads as a patched one does; whether there is such a method."""
    call = slicing(calls)
    if call is None:
        yield False
        return
    with ExitStack() as stack:
        stack.enter_context(patch(model, [call]))
        for layer in family_of(model).unread_layers({}):
            stack.callback(shadow(layer, "forward", _pass_on))
        yield True


def _pass_on(original: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    return hidden_states
