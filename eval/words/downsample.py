"""Downsample: the picture itself is made smaller, so that the encoder gives about as many tokens.

It acts on the processor's side, so that no model is patched with it: sweeps and comparisons give
the dense model smaller pictures, in the way that its family says (`EvalFamily.smaller`). The count
is the reachable one nearest to the budget; full budget leaves pictures as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from ...prune.budget import MethodCall, plan
from ...prune.contract import Cut, Method, ModelShape, Place, Pruning, Signal
from ...prune.errors import UnsupportedFeatureError
from ...prune.registry import method_class
from ...prune.shipped import ELSEWHERE
from .typed import DOWNSAMPLE


@dataclass(frozen=True, kw_only=True)
class Downsample(Pruning):
    """The baseline; budgets mean what they mean for a cut in front of the LLM."""

    name: ClassVar[str] = DOWNSAMPLE
    place: ClassVar[Place] = Place.BEFORE_LLM

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        return (Cut(Place.BEFORE_LLM),)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        """Asked by whoever is about to patch a model.

        Raises:
            UnsupportedFeatureError: always.
        """
        raise UnsupportedFeatureError(f"{DOWNSAMPLE} {ELSEWHERE[DOWNSAMPLE]}")


def class_of(name: str) -> type[Method]:
    """The class of a method's name in results and on the command line.

    Raises:
        UnknownMethodError, PluginError: as `method_class`.
    """
    return Downsample if name == DOWNSAMPLE else method_class(name)


def downsampling(calls: Sequence[MethodCall]) -> MethodCall | None:
    """The call of this baseline among those of a cell; None: a model is patched, or dense.

    Raises:
        UnsupportedFeatureError: it stands beside others, whose shares would be of other tokens.
    """
    found = next((call for call in calls if isinstance(call.method, Downsample)), None)
    if found is not None and len(calls) > 1:
        raise UnsupportedFeatureError(
            f"{DOWNSAMPLE} cannot be combined with {', '.join(c.name for c in calls if c != found)}"
            f": give it a cell of its own."
        )
    return found


def wanted_count(call: MethodCall, shape: ModelShape) -> Callable[[int], int]:
    """How many tokens the budget asks for, of an image that has so many."""

    def count(tokens: int) -> int:
        stages = plan(tokens, [call], shape)
        return stages[-1].keep if stages else tokens

    return count
