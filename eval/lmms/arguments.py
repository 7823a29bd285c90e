"""What `--model_args` may say about pruning, read into what `patch` takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ...prune.budget import BUDGET_WORDS, Budget, MethodCall
from ...prune.errors import BudgetError, MethodFieldError, did_you_mean
from ...prune.registry import method_class
from ..words.parts import Part, Parts, parse

DENSE = ("none", "dense")


def calls_of(
    word: str, budget: Budget | None, fields: Mapping[str, object], known: Collection[str]
) -> tuple[MethodCall, ...]:
    """What a model is patched with; nothing for the dense model.

    Args:
        word: a method, or several, as the command line writes them.
        budget: for the methods that have none of their own.
        fields: of the method, beyond those in the word.
        known: other arguments, for the hint that follows an unknown one.

    Raises:
        MethodFieldError: an argument that nobody knows.
        BudgetError: a budget that is missing or has no taker.
    """
    single = word not in DENSE and "+" not in word
    own = set(method_class(word.partition("@")[0].partition(":")[0])().fields()) if single else ()
    for name in fields:
        if name not in own:
            hint = did_you_mean(name, {*known, *BUDGET_WORDS, *own})
            raise MethodFieldError(f"Unknown argument {name!r} in --model_args. {hint}")
    if word in DENSE:
        if budget is not None:
            raise BudgetError(
                f"{budget} without a method: add e.g. method=divprune to --model_args."
            )
        return ()
    head, at, own_budget = word.partition("@")
    if fields:
        head = ":".join([head, *(f"{name}={value}" for name, value in fields.items())])
    parts = parse(f"{head}{at}{own_budget}")
    return tuple(part.call for part in _budgeted(parts, budget, word))


def _budgeted(parts: Parts, budget: Budget | None, word: str) -> list[Part]:
    if budget is not None and not any(part.open for part in parts):
        raise BudgetError(f"method={word} has its own budgets: leave {budget} out.")
    found = [part.at(budget) for part in parts]
    for part in found:
        if part.budget is None and part.method.wants_budget:
            name = part.method.name
            raise BudgetError(
                f"{name} needs a budget: add one of keep_ratio=0.25, keep_tokens=64, "
                f"average_tokens=128 or flops_ratio=0.3 to --model_args, or write "
                f"method={name}@0.25."
            )
    return found
