"""How far a method answers as the dense model does, whatever its accuracy: answers that are the
same, and questions whose outcome turned."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Agreement:
    """A cell beside the dense one of its setting, question by question."""

    same_answers: float | None
    """Share of answers with the same words; None where a record is older than its digests."""
    turned_wrong: int | None
    """Questions that dense answers right and the method wrong; None of scores between these."""
    turned_right: int | None


def digest(answer: str) -> str:
    """What a record keeps of an answer: enough to tell whether another one is the same."""
    return hashlib.sha256(answer.strip().encode()).hexdigest()[:8]


def agreement(record: Mapping[str, Any], dense: Mapping[str, Any], metric: str) -> Agreement | None:
    """None where neither answers nor outcomes can be paired."""
    same, turned = _same(record, dense), _turned(record, dense, metric)
    if same is None and turned is None:
        return None
    return Agreement(same, *(turned or (None, None)))


def _same(record: Mapping[str, Any], dense: Mapping[str, Any]) -> float | None:
    ours: Sequence[str] = record.get("answers", ())
    theirs: Sequence[str] = dense.get("answers", ())
    if not ours or len(ours) != len(theirs):
        return None
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _turned(
    record: Mapping[str, Any], dense: Mapping[str, Any], metric: str
) -> tuple[int, int] | None:
    scores = [each["scores"].get(metric) for each in (record, dense)]
    if None in scores:
        return None
    ours, theirs = (score["outcomes"] for score in scores)
    if not ours or len(ours) != len(theirs) or not {*ours, *theirs} <= {0, 1}:
        return None
    pairs = [*zip(ours, theirs, strict=True)]
    return sum(a < b for a, b in pairs), sum(a > b for a, b in pairs)
