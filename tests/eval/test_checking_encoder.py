"""`check-method` finds what methods inside the vision encoder break."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from vlmprune.eval.checking.cases import CASES
from vlmprune.eval.checking.in_encoder import exact_rows
from vlmprune.eval.checking.properties import _each, _exact, _questions, _Subject, _whole
from vlmprune.eval.models.tiny_models import Case
from vlmprune.prune.blocks import FewCuts
from vlmprune.prune.contract import Reduction
from vlmprune.prune.registry import method_class


@dataclass(frozen=True, kw_only=True)
class First(FewCuts):
    """The first rows."""

    name: ClassVar[str] = "first_rows"

    def reduce(self, rows, keep):
        first = torch.arange(keep).expand(len(rows.numbers), -1)
        return Reduction(source=first)


class Merging(First):
    """The rows behind become part of the last that stays."""

    def reduce(self, rows, keep):
        owner = torch.arange(rows.count).clamp_max(keep - 1).expand(len(rows.numbers), -1)
        return Reduction(source=super().reduce(rows, keep).source, owner=owner)


class Elsewhere(First):
    """Rows go into others than those that they give their numbers to."""

    def reduce(self, rows, keep):
        owner = torch.arange(rows.count).clamp_max(keep - 1).flip(0)
        return Reduction(
            source=super().reduce(rows, keep).source, owner=owner.expand(len(rows.numbers), -1)
        )


class ByPlaceInTheBatch(First):
    """Other rows stay of the second picture than of the first."""

    def reduce(self, rows, keep):
        shift = torch.arange(len(rows.numbers))[:, None] % 2
        return Reduction(source=super().reduce(rows, keep).source + shift)


class Empty(First):
    """A new row that nothing goes into."""

    def reduce(self, rows, keep):
        owner = torch.zeros(len(rows.numbers), rows.count, dtype=torch.long)
        return Reduction(source=super().reduce(rows, keep).source, owner=owner)


class Unkept(First):
    """Its counts are others than those that it is asked for."""

    def block_counts(self, tower, rows, keep):
        return (rows,) * len(self.blocks(tower))


@pytest.fixture(scope="module")
def case() -> Case:
    return CASES["llava-clip-llama"]


def check(cls, case: Case, *properties) -> None:
    subject = _Subject(cls(), case, case.model(), {})
    for holds in properties:
        holds(subject)


@pytest.mark.parametrize("cls", [First, Merging])
def test_what_holds_passes(cls, case):
    check(cls, case, _exact, _each, _whole)


@pytest.mark.parametrize(
    ("cls", "holds", "said"),
    [
        (Elsewhere, _whole, "own place"),
        (ByPlaceInTheBatch, _each, "of it alone"),
        (Empty, _exact, "a new row of no rows"),
        (Unkept, _exact, "the last must be"),
    ],
)
def test_what_is_broken_is_found(cls, holds, said, case):
    with pytest.raises(Exception, match=said):
        check(cls, case, holds)


def test_a_method_that_restores_rows_is_counted_in_the_encoder(case):
    expedit = method_class("expedit")
    check(expedit, case, _exact)

    seen = [([9], [9])] * 5
    with pytest.raises(Exception, match="is 18, and 9 stayed"):
        exact_rows(expedit(), case.shape.tower, [[(6, 6)]], seen, 0.5)


def test_questions_are_of_every_cut(case):
    subject = _Subject(First(), case, case.model(), {})
    asked = list(_questions(subject))
    assert {question.call for question in asked} == {"reduce"}
    blocks = {question.given[0].cut.block for question in asked}
    assert blocks == {cut.block for cut in First().blocks(case.shape.tower)}
