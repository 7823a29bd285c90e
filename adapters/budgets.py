"""The budget of a request: what a thread asks for beside the settings of the patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..prune.budget import BUDGET_WORDS, Budget, MethodCall, plan
from ..prune.errors import BudgetError, MethodFieldError
from .patch_setup import Setup

_EVERYTHING = Budget("keep_ratio", 1.0)


@dataclass(frozen=True)
class Budgets:
    """One budget for all images of a call, or one for each of them in the order of the batch."""

    each: tuple[Budget, ...]
    per_image: bool

    @classmethod
    def of(cls, **words: object) -> Budgets:
        """From one keyword, whose value may be a list; None in it keeps its image whole.

        Raises:
            BudgetError, MethodFieldError: not exactly one budget, or a value out of range.
        """
        if unknown := [word for word in words if word not in BUDGET_WORDS]:
            raise MethodFieldError(
                f"{', '.join(unknown)} is no budget: give one of {', '.join(BUDGET_WORDS)}. Fields "
                f"change with the method, e.g. "
                f'handle.set("fastv", {unknown[0]}={words[unknown[0]]!r}, keep_ratio=0.25).'
            )
        if len(words) != 1:
            Budget.of(**words)  # refuses several
            raise BudgetError(f"No budget is given: pass one of {', '.join(BUDGET_WORDS)}.")
        ((word, value),) = words.items()
        if getattr(value, "ndim", 0) == 1 and hasattr(value, "tolist"):  # an array, a tensor
            value = value.tolist()
        if not isinstance(value, Sequence) or isinstance(value, str):
            budget = Budget.of(**{word: value})
            assert budget is not None  # noqa: S101  (for the types)
            return cls((budget,), per_image=False)
        if not value:
            raise BudgetError(f"{word}=[] gives no image a budget: one for each, or None to keep.")
        each = [Budget.of(**{word: one}) if one is not None else None for one in value]
        return cls(tuple(budget or _EVERYTHING for budget in each), per_image=True)

    def applied(self, setup: Setup) -> Setup:
        """The setup of calls with these budgets.

        Raises:
            BudgetError: several methods have their own, or the method cannot reach one of them.
        """
        if len(setup.calls) > 1:
            raise BudgetError(
                f"The patch has {len(setup.calls)} methods with a budget each "
                f"({', '.join(map(str, setup.calls))}), and one is given: set them all, e.g. "
                f'handle.set([vlmprune.method("divprune", keep_ratio=0.5), ...]).'
            )
        (call,) = setup.calls
        first = MethodCall(call.method, self.each[0])
        return replace(setup, calls=(first,), per_image=self.each if self.per_image else None)

    def check(self, setup: Setup, tokens: int | None) -> Setup:
        """The same, if every budget can be reached; `tokens` of an image, where all have as many.

        Raises:
            BudgetError: also for what only `tokens` tell.
        """
        applied = self.applied(setup)
        for budget in self.each:
            calls = (MethodCall(applied.calls[0].method, budget),)
            if tokens is not None:
                plan(tokens, calls, setup.shape)
        return applied
