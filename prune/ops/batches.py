"""Images (or tiles) of one size that a method can choose from in one pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contract import BeforeLLM, Selection, Signal, VisualTokens

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


def stacked(images: Sequence[VisualTokens], signal: Signal) -> Tensor:
    """A signal of images of equal size: (B, N, ...)."""
    return torch.stack([tokens.signals[signal] for tokens in images])


def in_one_pass(asked: Sequence[tuple[VisualTokens, int]], choose: OfEqualSize) -> list[Selection]:
    """Answers in the order asked, `choose` being called once for every size and count."""
    answers: dict[int, Selection] = {}
    for numbers in alike([(tokens.num_tokens, keep) for tokens, keep in asked]):
        images = [asked[i][0] for i in numbers]
        answers.update(zip(numbers, choose(images, asked[numbers[0]][1]), strict=True))
    return [answers[i] for i in range(len(asked))]


def alike(keys: Sequence[Hashable]) -> list[list[int]]:
    """Numbers of the equal ones among `keys`, by their first."""
    groups: dict[Hashable, list[int]] = {}
    for number, key in enumerate(keys):
        groups.setdefault(key, []).append(number)
    return list(groups.values())
