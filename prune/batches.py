"""Images (or tiles) of one size that a method can choose from in one pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .contract import BeforeLLM, Selection, Signal, VisualTokens

T = TypeVar("T")
R = TypeVar("R")

OfEqualSize = Callable[[Sequence[VisualTokens], int], list[Selection]]
"""Chooses as many tokens of each of several images, which have equally many."""


@dataclass(frozen=True, kw_only=True)
class InOnePass(BeforeLLM):
    """A method whose rule is written for several images of equal size; one image is one of them."""

    @abstractmethod
    def select_equal(self, images: Sequence[VisualTokens], keep: int) -> list[Selection]:
        """Choose exactly `keep` tokens of each image, all of which have equally many."""

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return self.select_equal([tokens], keep)[0]

    def select_batch(self, asked: Sequence[tuple[VisualTokens, int]]) -> list[Selection]:
        return in_one_pass(asked, self.select_equal)


def ranked(kept: Tensor, scores: Tensor) -> Selection:
    """The tokens `kept` (K,), by the scores (N,) of all."""
    return Selection(kept=kept, scores=scores)


def stacked(images: Sequence[VisualTokens], signal: Signal) -> Tensor:
    """A signal of images of equal size: (B, N, ...)."""
    return torch.stack([tokens.signals[signal] for tokens in images])


def in_one_pass(asked: Sequence[tuple[VisualTokens, int]], choose: OfEqualSize) -> list[Selection]:
    """Answers in the order asked, `choose` being called once for every size and count."""
    return of_each_kind(
        asked,
        lambda one: (one[0].num_tokens, one[1]),
        lambda some: choose([tokens for tokens, _ in some], some[0][1]),
    )


def of_each_kind(
    items: Sequence[T], kind: Callable[[T], Hashable], answer: Callable[[list[T]], Iterable[R]]
) -> list[R]:
    """Answers in the order of `items`, `answer` being called once with all items of a kind."""
    numbers: dict[Hashable, list[int]] = {}
    for number, item in enumerate(items):
        numbers.setdefault(kind(item), []).append(number)
    answers: dict[int, R] = {}
    for some in numbers.values():
        answers.update(zip(some, answer([items[i] for i in some]), strict=True))
    return [answers[i] for i in range(len(items))]
