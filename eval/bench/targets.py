"""What this library promises of its speed, and whether a measurement keeps the promise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ...prune.contract import Place
from ..results.statistics import Spread

Verdict = Literal["met", "open", "missed"]

_FEW_TOKENS = 1024  # up to which choosing may take 1 % of a dense prefill, above 2 %


@dataclass(frozen=True)
class Target:
    """A ratio that is to be at most `limit`."""

    what: str
    ratio: str
    """Its name in a report."""
    limit: float

    def verdict(self, measured: Spread) -> Verdict:
        """By the median; open where the lower quartile keeps what the median does not."""
        if measured["median"] <= self.limit:
            return "met"
        return "open" if measured["q1"] <= self.limit else "missed"


def targets(
    model: Mapping[str, Any], place: str | None, *, in_encoder: bool = False
) -> list[Target]:
    """The promises for a method that acts at `place`, its deepest; none for the dense model.

    Args:
        model: what a report says of it.
        in_encoder: whether rows leave inside the vision encoder, too.
    """
    if place is None:
        return []
    prefill = 1.10
    if place == Place.BEFORE_LLM.value:
        prefill = 1.05 if model.get("ragged") else 1.03
    elif place == Place.ENCODER.value:
        prefill = 1.05
    both = [
        Target("first token / oracle", "total_over_oracle", prefill),
        Target("decoding / oracle", "decode_over_oracle", 1.02),
    ]
    if in_encoder:
        return [*both, Target("encoder / slicing", "vision_over_slicing", 1.05)]
    return [
        *both,
        Target("vision / plain", "vision_over_plain", 1.02),
        Target(
            "choosing / dense prefill",
            "select_over_dense_prefill",
            0.01 if model["visual_tokens"] <= _FEW_TOKENS else 0.02,
        ),
    ]


def verdicts(model: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[Target, Verdict]:
    """Of every promise that was measured."""
    ratios = variant["ratios"]
    return {
        target: target.verdict(ratios[target.ratio])
        for target in targets(model, variant["place"], in_encoder="vision_over_slicing" in ratios)
        if ratios.get(target.ratio)
    }
