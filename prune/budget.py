"""One vocabulary for budgets, and the one place where a budget becomes token counts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .amount import BUDGET_WORDS, PUBLISHED, Budget, BudgetWord
from .contract import Cut, Decoder, Images, Method, ModelShape, Place, Pruning
from .errors import BudgetError, MethodAnswerError

__all__ = [
    "BUDGET_WORDS",
    "PUBLISHED",
    "Budget",
    "BudgetWord",
    "MethodCall",
    "Stage",
    "entries_kept",
    "idle",
    "layer_flops",
    "plan",
    "remark",
    "round_tokens",
    "tokens_per_layer",
]


@dataclass(frozen=True, slots=True)
class MethodCall:
    """A method and the budget it runs with; what `vlmprune.method` returns."""

    method: Method
    budget: Budget | None
    found: int | None = None
    """The count that the method found for an image itself."""

    def __post_init__(self) -> None:
        self.method.check_budget(self.budget)

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def adaptive(self) -> bool:
        """Whether the method finds the number of tokens itself, image by image."""
        method = self.method
        own = self.budget is None and self.found is None
        return own and isinstance(method, Pruning) and method.finds_count

    def __str__(self) -> str:
        return f"{self.name}({self.budget})" if self.budget else self.name


@dataclass(frozen=True, slots=True)
class Stage:
    """One cut of one method, with its count for an image: what follows sees `keep` tokens.

    Where the method finds its own count in the tensors (`adaptive`), `keep` is the most it may
    keep; the stage of a finished choice has the count that was found. Of a cut that pools images
    (`images`), `keep` is this image's part of what stays of all of them.
    """

    call: MethodCall
    cut: Cut
    keep: int
    adaptive: bool = False

    @property
    def place(self) -> Place:
        return self.cut.place

    @property
    def layer(self) -> int:
        """The first decoder layer that sees fewer tokens; 0, all layers, before the LLM."""
        return self.cut.layer

    @property
    def images(self) -> Images:
        return self.cut.images

    def at(self, place: Place, layer: int = 0) -> bool:
        """Whether the cut is there."""
        return self.cut.depth == (place.depth, layer)


def round_tokens(ratio: float, num_tokens: int) -> int:
    """The count for a ratio: rounded half to even, at least 1. The only rounding of ratios."""
    return min(num_tokens, max(1, round(ratio * num_tokens)))


def layer_flops(num_tokens: int, decoder: Decoder) -> int:
    """Multiply-adds of one decoder layer on `num_tokens` tokens, the literature's convention.

    `4nd^2 + 2n^2d + 3ndm` (PyramidDrop, SparseVLM, TransPrune): projections, attention, SwiGLU MLP.
    """
    n, d, m = num_tokens, decoder.hidden_size, decoder.intermediate_size
    return 4 * n * d * d + 2 * n * n * d + 3 * n * d * m


def tokens_per_layer(num_tokens: int, stages: Sequence[Stage], num_layers: int) -> list[int]:
    """Visual tokens of one image that enter each decoder layer."""
    alive = [num_tokens] * num_layers
    for stage in stages:
        alive[stage.layer :] = [stage.keep] * (num_layers - stage.layer)
    return alive


def plan(
    num_tokens: int, calls: Sequence[MethodCall], shape: ModelShape, images: Images = "query"
) -> tuple[Stage, ...]:
    """The exact counts for an image of `num_tokens` visual tokens, from sizes alone.

    Cuts that would keep everything still alive are left out: full budget does nothing at all.

    Args:
        num_tokens: N, all tiles and newlines of the image.
        calls: methods in order of depth; those on the cache remove nothing from the sequence.
        shape: sizes of the model.
        images: whether it is the prompt's last image (`query`) or one before it (`context`).

    Raises:
        BudgetError: the budget cannot be reached; the nearest that can is named.
    """
    stages: tuple[Stage, ...] = ()
    for call in calls:
        if isinstance(call.method, Pruning):
            keep = _last_count(call, call.method, num_tokens, stages, shape)
            stages += _stages(call, call.method, num_tokens, keep, stages, shape, images)
    return stages


def remark(call: MethodCall, num_tokens: int) -> str | None:
    """What to say of a count that an image of `num_tokens` tokens cannot have; None: nothing."""
    budget = call.budget
    if budget is None or budget.word not in ("keep_tokens", "average_tokens"):
        return None
    if budget.value > num_tokens:
        return f"{call} is above an image's {num_tokens} tokens: all of them stay."
    if budget.value < 1:
        return f"{call} is below 1, the least that stays of an image (shares are keep_ratio)."
    return None


def idle(calls: Sequence[MethodCall]) -> Iterator[str]:
    """What to say of methods that an earlier one leaves nothing to remove.

    Args:
        calls: in order of depth.
    """
    for number, call in enumerate(calls):
        for before in calls[:number]:
            one, other = before.budget, call.budget
            if one and other and one.word == other.word and other.value >= one.value:
                yield (
                    f"{call} has nothing to do behind {before}, as budgets count all tokens of an "
                    f"image: give {call.name} less than {one}, or leave it out."
                )
                break


def entries_kept(call: MethodCall, visual: Sequence[int], text: int) -> int | None:
    """Entries of a prompt that a method on the cache keeps (or attends to) in each layer.

    Args:
        visual: tokens of each of the prompt's images, before any method.
        text: the prompt's other tokens.

    Returns:
        the text's entries and the budget's share of the visual ones; None without a budget.
    """
    if call.budget is None:
        return None
    if call.budget.word == "keep_ratio":
        return text + sum(round_tokens(call.budget.value, n) for n in visual)
    return text + sum(min(n, int(call.budget.value)) for n in visual)


def _stages(
    call: MethodCall,
    method: Pruning,
    num_tokens: int,
    keep: int,
    before: tuple[Stage, ...],
    shape: ModelShape,
    images: Images,
) -> tuple[Stage, ...]:
    """The method's cuts with `keep` tokens after the last one, never more than are alive."""
    fixed = call.budget is not None or call.found is not None
    if fixed and keep >= num_tokens:
        return ()
    alive = before[-1].keep if before else num_tokens
    stages: list[Stage] = []
    by_schedule = not (fixed or call.adaptive)
    asked = "published_counts" if by_schedule else "counts"
    counts = (
        method.published_counts(shape, num_tokens)
        if by_schedule
        else method.counts(shape, num_tokens, keep)
    )
    cuts = method.cuts(shape)
    if len(counts) != len(cuts):
        raise MethodAnswerError(
            f"{method.name}.{asked} returned {counts!r}, but it must be a count for each of its "
            f"{len(cuts)} cuts. Return the tokens alive after each."
        )
    for cut, count in zip(cuts, counts, strict=True):
        if cut.images not in ("each", images):
            continue
        adaptive = call.adaptive or cut.adaptive
        count = alive if cut.adaptive else min(alive, max(method.least, count))
        if count < alive or adaptive:
            stages.append(Stage(call, cut, count, adaptive))
            alive = count
    return tuple(stages)


def _last_count(
    call: MethodCall,
    method: Pruning,
    num_tokens: int,
    before: tuple[Stage, ...],
    shape: ModelShape,
) -> int:
    """Tokens alive after the method's last cut."""
    budget = call.budget
    if call.found is not None:
        return call.found
    if budget is None:
        if method.wants_budget:
            raise BudgetError(f"{call.name} needs a budget, e.g. keep_ratio=0.25.")
        # How many an adaptive rule finds at most depends on the tiles (`select.most`).
        return num_tokens if call.adaptive else method.most(num_tokens)
    if budget.word == "keep_ratio":
        return round_tokens(budget.value, num_tokens)
    if budget.word == "keep_tokens":
        return min(num_tokens, int(budget.value))

    alive = before[-1].keep if before else num_tokens
    layers = shape.decoder.num_layers

    def entering(keep: int) -> list[int]:
        stages = before + _stages(call, method, num_tokens, keep, before, shape, "query")
        return tokens_per_layer(num_tokens, stages, layers)

    def average(keep: int) -> float:
        return sum(entering(keep)) / layers

    def flops_share(keep: int) -> float:
        spent = sum(layer_flops(n, shape.decoder) for n in entering(keep))
        return spent / (layers * layer_flops(num_tokens, shape.decoder))

    cost = average if budget.word == "average_tokens" else flops_share
    return _solve(cost, budget, alive, str(call))


def _solve(cost: Callable[[int], float], budget: Budget, alive: int, call: str) -> int:
    """The count whose cost is nearest to the budget (the lower count of two)."""
    low, high = 1, alive
    if cost(low) > budget.value:
        # One token is the least a method keeps; half a token of slack is the rounding of counts.
        slack = (cost(min(2, alive)) - cost(low)) / 2
        if cost(low) - budget.value > slack:
            nearest = math.ceil(cost(low) * 1e6) / 1e6
            raise BudgetError(
                f"{call} cannot be reached: its layers before the cut see all {alive} tokens. "
                f"The nearest that can is {budget.word}={nearest:g}; or cut earlier."
            )
        return low
    while high - low > 1:  # cost grows with the count
        middle = (low + high) // 2
        if cost(middle) <= budget.value:
            low = middle
        else:
            high = middle
    near_high = abs(cost(high) - budget.value) < abs(cost(low) - budget.value)
    return high if near_high else low
