"""What a model is patched with, as typed on the command line: a method, or several in one word.

fastv                          a method, whose budget is given elsewhere
fastv:layer=3@0.25             with a field, and a budget of its own
divprune@0.5+fastv:layer=3     two methods; the second takes the budget given elsewhere
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from ...prune.budget import BUDGET_WORDS, PUBLISHED, Budget, MethodCall
from ...prune.contract import Method
from ...prune.errors import BudgetError, MethodFieldError
from ...prune.registry import made_of
from .downsample import Downsample, class_of
from .typed import DENSE, DOWNSAMPLE, parse_fields, split_parts


@dataclass(frozen=True, slots=True)
class Part:
    """A method and its budget (None: as published), not yet checked against each other.

    `open`: no budget was given with the method, so that it takes one that is given elsewhere.
    """

    method: Method
    budget: Budget | None = None
    open: bool = False

    def at(self, budget: Budget | None) -> Part:
        """With this budget, if it has none of its own."""
        return Part(self.method, budget) if self.open else self

    @property
    def call(self) -> MethodCall:
        """What `patch` takes.

        Raises:
            BudgetError: the method cannot run with this budget.
        """
        return MethodCall(self.method, self.budget)


Parts = tuple[Part, ...]
"""What a model is patched with, in order of depth; nothing for the dense model."""


def parse(text: str, seed: int = 0) -> Parts:
    """Read one word; methods with a field `seed` get this one unless the word sets it.

    Raises:
        UnknownMethodError, MethodFieldError, BudgetError: each says what to type instead.
    """
    parts = [_part(word, seed) for word in split_parts(text)]
    if len(parts) > 1 and any(isinstance(part.method, Downsample) for part in parts):
        raise MethodFieldError(
            f"{text!r}: {DOWNSAMPLE} cannot be combined with methods: write it as a word alone."
        )
    return tuple(sorted(parts, key=lambda part: part.method.place))


def parse_budgets(words: Sequence[str]) -> list[Budget | None]:
    """Budgets as typed; None stands for `published`."""
    return [None if word == PUBLISHED else Budget.parse(word) for word in words]


def grid(words: Sequence[Parts], budgets: Sequence[Budget | None]) -> list[Parts]:
    """The dense model first, then everything with every budget, each combination once.

    The budget None stands for a method's own schedule or rule; methods without one skip it.
    """
    cells: list[Parts] = [()]
    for parts in words:
        for budget in budgets:
            cell = tuple(part.at(budget) for part in parts)
            if cell not in cells and not any(map(_lacks_budget, cell)):
                cells.append(cell)
    return cells


def combined(methods: Sequence[str], budgets: Sequence[str], seed: int) -> list[Parts]:
    """The grid of what was typed.

    Raises:
        UnknownMethodError, MethodFieldError, BudgetError: each says what to type instead.
    """
    words = [parse(text, seed) for text in methods if text != DENSE]
    amounts = parse_budgets(budgets)
    refuse_without_budget(words, amounts)
    return grid(words, amounts)


def refuse_without_budget(words: Sequence[Parts], budgets: Sequence[Budget | None]) -> None:
    """Refuse methods that a grid of these budgets would leave out.

    Raises:
        BudgetError: for the first of them; it says what to give.
    """
    for parts in words:
        if parts and len(grid([parts], budgets)) == 1:  # the dense model alone
            name = next(
                part.method.name for part in parts if part.open and part.method.wants_budget
            )
            raise BudgetError(
                f"{name} needs a budget: give one of keep_ratio=0.25, keep_tokens=64, "
                f"average_tokens=128 or flops_ratio=0.3, or write it behind the method, "
                f"{name}@0.25."
            )


def _lacks_budget(part: Part) -> bool:
    return part.budget is None and part.method.wants_budget


def _part(text: str, seed: int) -> Part:
    head, at, budget = text.partition("@")
    name, *words = head.split(":")
    fields = parse_fields(words)
    for word in BUDGET_WORDS:
        if word in fields:
            raise MethodFieldError(
                f"{text!r}: a budget is written behind the method, {name}@0.5, or given to the "
                f"whole command (sweep and bench: --budgets 0.5; ask: --keep_ratio 0.5)."
            )
    if "seed" in {field.name for field in dataclasses.fields(class_of(name))}:
        fields.setdefault("seed", seed)
    made = _made(name, fields)
    return Part(made, _own_budget(made, budget)) if at else Part(made, open=True)


def _made(name: str, fields: dict[str, object]) -> Method:
    if name != DOWNSAMPLE:
        return made_of(name, fields)
    if fields:
        raise MethodFieldError(f"{name} has no fields: leave {', '.join(fields)} out.")
    return Downsample()


def _own_budget(made: Method, text: str) -> Budget | None:
    if "=" in text:
        raise MethodFieldError(
            f"'@{text}': fields come before the budget, e.g. fastv:layer=3@0.25."
        )
    (budget,) = parse_budgets([text])
    if budget is None and made.wants_budget:
        raise BudgetError(
            f"'{made.name}@{PUBLISHED}' is not possible, as {made.name} has no schedule of its "
            f"own: give a budget, e.g. {made.name}@0.25."
        )
    return budget
