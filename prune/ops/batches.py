"""Images (or tiles) of one size that a method can choose from in one pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from ..contract import Selection, VisualTokens

OfEqualSize = Callable[[Sequence[VisualTokens], int], list[Selection]]
"""Chooses as many tokens of each of several images, which have equally many."""


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
