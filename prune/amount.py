"""What a budget is: one word and its value. Nothing else is imported, not even torch, so that the
command line can read budgets at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .errors import BudgetError
from .numbers import plain

BudgetWord = Literal["keep_ratio", "keep_tokens", "average_tokens", "flops_ratio"]
BUDGET_WORDS: tuple[BudgetWord, ...] = (
    "keep_ratio",
    "keep_tokens",
    "average_tokens",
    "flops_ratio",
)
PREFIXES: dict[str, str] = {"average_tokens": "avg:", "flops_ratio": "flops:"}
"""What is typed before a number that is neither a share nor a count of kept tokens."""
PUBLISHED = "published"
"""Among budgets on the command line: none, the method's own schedule or rule."""


@dataclass(frozen=True, slots=True)
class Budget:
    """How many visual tokens of an image stay: one word and its value.

    * `keep_ratio` (0 < x <= 1): share of the image's tokens alive after the last cut.
    * `keep_tokens` (>= 1): their count per image; more than the image has keeps all of them.
    * `average_tokens` (> 0): mean over decoder layers of the tokens entering the layer.
    * `flops_ratio` (0 < x <= 1): share of the dense decoder prefill FLOPs of the visual tokens.
    """

    word: BudgetWord
    value: float

    def __post_init__(self) -> None:
        value = plain(self.value)
        object.__setattr__(self, "value", value)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise BudgetError(f"{self.word}={value!r} is not a number: {_ALLOWED[self.word]}.")
        fine = {
            "keep_ratio": 0 < value <= 1,
            "keep_tokens": value >= 1 and float(value).is_integer(),
            "average_tokens": value > 0,
            "flops_ratio": 0 < value <= 1,
        }[self.word]
        if not fine:
            raise BudgetError(f"{self.word}={value!r} is not possible: {_ALLOWED[self.word]}.")

    @classmethod
    def of(cls, **words: object) -> Budget | None:
        """The budget among keyword arguments; `None` without one.

        Raises:
            BudgetError: two budgets at once, or a value out of range.
        """
        if len(words) > 1:
            raise BudgetError(
                f"Two budgets at once ({', '.join(f'{k}={v}' for k, v in words.items())}): "
                f"give exactly one of {', '.join(BUDGET_WORDS)}."
            )
        for word, value in words.items():
            return cls(word, value)  # type: ignore[arg-type]
        return None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """A budget as typed on the command line.

        `0.25` is a keep_ratio, `64` a keep_tokens, `avg:64` an average_tokens and `flops:0.3` a
        flops_ratio.
        """
        head, colon, number = text.rpartition(":")
        words = {prefix: word for word, prefix in PREFIXES.items()}
        try:
            if colon:
                return cls(words[head + colon], float(number))  # type: ignore[arg-type]
            if number.lstrip("+-").isdigit():
                return cls("keep_tokens", int(number))
            return cls("keep_ratio", float(number))
        except BudgetError as error:
            allowed = str(error).partition(": ")[2]
            for word, typed in _TYPED.items():
                allowed = allowed.replace(word, typed)
            raise BudgetError(f"Budget {text!r} is not possible: {allowed}") from None
        except (KeyError, ValueError):
            raise BudgetError(
                f"Budget {text!r} is not understood: write 0.25 (ratio kept), 64 (tokens kept), "
                f"avg:64 (average tokens per layer) or flops:0.3 (share of dense FLOPs)."
            ) from None

    def __str__(self) -> str:
        return f"{self.word}={self.value:g}"


_TYPED = {
    "0 < keep_ratio <= 1": "above 0 and at most 1",
    "0 < flops_ratio <= 1": "above 0 and at most 1",
    "tokens are keep_tokens": "64 and other whole numbers are tokens",
    "shares are keep_ratio": "0.25 is a share",
}
"""Words of keyword arguments, as somebody reads them who types budgets."""

_ALLOWED: dict[BudgetWord, str] = {
    "keep_ratio": "give the fraction to keep, 0 < keep_ratio <= 1 (tokens are keep_tokens)",
    "keep_tokens": "give a whole number of tokens per image, at least 1 (shares are keep_ratio)",
    "average_tokens": "give the mean number of tokens per decoder layer, above 0",
    "flops_ratio": "give the share of the dense FLOPs, 0 < flops_ratio <= 1",
}
