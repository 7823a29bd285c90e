"""What a choice of method and budget is to reach: `tokens=64`, `latency=0.6` or `accuracy=-1.0`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ...prune.errors import VlmpruneError
from ..results.records import Record, main_score
from ..results.statistics import confidence_above
from ..results.texts import scale

Word = Literal["tokens", "latency", "accuracy"]
_SLACK = 1.02  # counts and shares above the target by rounding still meet it


class TargetError(VlmpruneError, ValueError):
    """A target of `tune` that means nothing.

    Symptom: `tune` stops before it loads a model.
    Cause: another word than tokens, latency, accuracy, or a number that none can reach.
    Type: `--target tokens=64`, `--target latency=0.6` or `--target accuracy=-1.0`.
    Page: ERRORS.md#targeterror
    """


@dataclass(frozen=True)
class Target:
    """
    Attributes:
        word: `tokens`: the best score with so many visual tokens a decoder layer, as a mean;
            `latency`: with this share of dense's time to the first token; `accuracy`: the fewest
            FLOPs at a score that lies so far from dense, in percent (or the task's own points).
    """

    word: Word
    value: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """
        Raises:
            TargetError: it says what to write.
        """
        word, equals, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = float("nan")
        fits = {"tokens": value >= 1, "latency": 0 < value <= 1, "accuracy": -100 <= value <= 100}
        if not equals or not fits.get(word, False):
            raise TargetError(
                f"--target {text} is not possible: write tokens=64 (visual tokens a decoder layer, "
                f"at least 1), latency=0.6 (of dense's time to the first token, up to 1) or "
                f"accuracy=-1.0 (points above dense)."
            )
        return cls(word, value)  # type: ignore[arg-type]  # one of the keys above

    def __str__(self) -> str:
        return f"{self.word}={self.value:g}"

    def cost(self, record: Record) -> float | None:
        """What a cell pays, in the unit of the target; of `accuracy` the share of dense's FLOPs
        over visual tokens. None: it is not known."""
        if self.word == "tokens":
            return float(record["tokens"]["average_per_layer"])
        if self.word == "latency":
            share = record["times"]["share_of_dense"]
            return None if share is None else float(share["median"])
        return float(record["flops"]["visual_share"])

    def met(self, record: Record, dense: Record) -> float:
        """How sure it is that a cell meets the target: 0 or 1 where that is counted, of `accuracy`
        by its questions beside dense's."""
        cost = self.cost(record)
        if cost is None:
            return 0.0
        if self.word != "accuracy":
            return float(cost <= self.value * _SLACK)
        score, beside = main_score(record)[1], main_score(dense)[1]
        return confidence_above(score, beside, self.value / scale(score))

    def rank(self, record: Record, dense: Record) -> tuple[float, float]:
        """Lower is better. Those that cannot meet the target come last; of `accuracy` what is paid
        for each chance to meet it counts, else the score, and the cost where scores are equal."""
        cost, met = self.cost(record), self.met(record, dense)
        if cost is None or not met:
            return float("inf"), 0.0
        if self.word == "accuracy":
            return cost / met, cost
        return -worth(record), cost

    def better(self, record: Record, other: Record, dense: Record) -> float:
        """How sure it is that a cell is a better choice than another one: that its score is higher,
        or, of `accuracy`, that it meets the target, as it costs less."""
        if self.word == "accuracy":
            return self.met(record, dense)
        return confidence_above(main_score(record)[1], main_score(other)[1], 0.0)


def worth(record: Mapping[str, Any]) -> float:
    """The main score, so that more is better."""
    score = main_score(record)[1]
    return score["value"] if score["higher_is_better"] else -score["value"]


WORDS = get_args(Word)
