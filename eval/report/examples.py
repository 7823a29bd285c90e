"""The first questions of a task as every cell answered them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .cells import Cell, Section


@dataclass(frozen=True)
class Given:
    """The answer of one cell; `picture` as the record names it."""

    cell: Cell
    prediction: str
    score: float | None
    picture: str | None

    @property
    def verdict(self) -> str:
        """In a word: right and wrong where a score is all or nothing."""
        if self.score is None:
            return "not scored"
        if self.score in (0, 1):
            return "right" if self.score else "wrong"
        return f"score {self.score:.3g}"


@dataclass(frozen=True)
class Asked:
    """A question, the right answer and what the cells said."""

    question: str
    answer: str
    given: list[Given] = field(default_factory=list)


def asked(section: Section, most: int | None = None) -> list[Asked]:
    """The questions of a section's examples, in order; dense answers come first.

    Args:
        most: so many questions; None for all that were recorded.
    """
    found: dict[tuple[str, str, str], Asked] = {}
    for cell in section.done:
        for example in cell.record["examples"]:
            known = found.setdefault(
                _key(example), Asked(str(example["question"]), str(example["answer"]))
            )
            known.given.append(
                Given(cell, str(example["prediction"]), example["score"], example["picture"])
            )
    return list(found.values())[:most]


def _key(example: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(example["id"]), str(example["question"]), str(example["answer"])
