"""Images (or tiles) of one size that a method can choose from in one pass: they are grouped here.

A rule is written once, for several images: `InOnePass.select_equal` keeps as many tokens of each,
`Greedy.picks` picks them one after the other. Rules for one image alone are `Choosing.select`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .contract import BeforeLLM, Selection, Signal, VisualTokens
from .ops.parts import on_device
from .ops.topk import ascending


@dataclass(frozen=True, kw_only=True)
class InOnePass(BeforeLLM):
    """A method whose rule is written for several images of equal size; one image is one of them."""

    @abstractmethod
    def select_equal(self, images: Sequence[VisualTokens], keep: int) -> list[Selection]:
        """Choose exactly `keep` tokens of each image, all of which are of one `kind`."""

    def kind(self, tokens: VisualTokens) -> Hashable:
        """What images of one pass share: how many tokens they have."""
        return tokens.num_tokens

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return self.select_batch([(tokens, keep)])[0]

    def select_batch(self, asked: Sequence[tuple[VisualTokens, int]]) -> list[Selection]:
        found: dict[int, Selection] = {}
        for numbers in alike((self.kind(tokens), keep) for tokens, keep in asked):
            images, keep = [asked[i][0] for i in numbers], asked[numbers[0]][1]
            found.update(zip(numbers, self.select_equal(images, keep), strict=True))
        return [found[i] for i in range(len(asked))]


@dataclass(frozen=True, kw_only=True)
class Greedy(BeforeLLM):
    """A method that picks one token after the other.

    Fewer picks are the beginning of more, so that images of equal size are one pass, whatever their
    counts.
    """

    @abstractmethod
    def picks(self, images: Sequence[VisualTokens], count: int) -> Tensor:
        """The first `count` picks of each image, all of which have equally many tokens:
        (B, count) int64 in the order of picking."""

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return self.select_batch([(tokens, keep)])[0]

    def select_batch(self, asked: Sequence[tuple[VisualTokens, int]]) -> list[Selection]:
        found: dict[int, Selection] = {}
        for numbers in alike(tokens.num_tokens for tokens, _ in asked):
            images, keeps = zip(*(asked[i] for i in numbers), strict=True)
            kept = _beginnings(self.picks(images, max(keeps)), keeps)
            found.update(zip(numbers, [Selection(kept=own) for own in kept], strict=True))
        return [found[i] for i in range(len(asked))]


def ranked(kept: Tensor, scores: Tensor) -> Selection:
    """The tokens `kept` (K,), by the scores (N,) of all."""
    return Selection(kept=kept, scores=scores)


def stacked(images: Sequence[VisualTokens], signal: Signal) -> Tensor:
    """A signal of images of equal size: (B, N, ...)."""
    return torch.stack([tokens.signals[signal] for tokens in images])


def alike(kinds: Iterable[Hashable]) -> list[list[int]]:
    """The numbers of the items of each kind, kinds in the order in which they first appear."""
    numbers: dict[Hashable, list[int]] = {}
    for number, kind in enumerate(kinds):
        numbers.setdefault(kind, []).append(number)
    return list(numbers.values())


def _beginnings(picks: Tensor, counts: Sequence[int]) -> list[Tensor]:
    """The first picks of each row of (B, K), as many as its count says, in raster order."""
    most = picks.shape[1]
    if min(counts) < most:
        beyond = torch.arange(most, device=picks.device) >= on_device(counts, picks.device)[:, None]
        picks = picks.masked_fill(beyond, torch.iinfo(picks.dtype).max)
    return [row[:count] for row, count in zip(ascending(picks), counts, strict=True)]
