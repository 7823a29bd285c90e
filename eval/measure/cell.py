"""A cell of a sweep, put together of what each process that shared its questions did."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from ..results.records import Example, Measured
from ..results.statistics import Score, mean_score
from .answering import Answer, flops_of, tokens_of
from .flops import ModelCost
from .times import Measurement
from .where_kept import Seen

if TYPE_CHECKING:
    import torch

    from ...adapters.report import Last


@dataclass
class Share:
    """What one process did; `seen` by the order in which it was asked."""

    notes: set[str] = field(default_factory=set)
    modes: set[str] = field(default_factory=set)
    seen: Seen = field(default_factory=Seen)

    def note(self, last: Last, evidence: Sequence[Any]) -> None:
        """What a patched model did with a batch; of each question its evidence, if it is known."""
        self.notes |= {last.note} if last.note else set()
        self.modes |= {last.positions}
        for row, own in enumerate(evidence):
            self.seen.note(last, row, own)


def cell_of(
    done: Sequence[Share],
    scores: dict[str, Score],
    answers: Sequence[Answer],
    cost: ModelCost,
    measured: Measurement,
    examples: list[Example],
) -> Measured:
    """The cell, without where tokens were kept."""
    return Measured(
        scores=scores,
        tokens=tokens_of(answers),
        flops=flops_of(answers, cost),
        times=measured.timings.summary(),
        kv_bytes=measured.kv_bytes,
        peak_memory_bytes=measured.peak_memory_bytes,
        positions=" ".join(sorted(set().union(*(share.modes for share in done)))) or None,
        notes=sorted(set().union(*(share.notes for share in done))),
        examples=examples,
    )


def score_of(outcomes: Sequence[float], kinds: Sequence[str]) -> Score:
    """The mean of outcomes, and the means of each kind of questions."""
    of_kinds: dict[str, list[float]] = defaultdict(list)
    for kind, outcome in zip(kinds, outcomes, strict=True):
        of_kinds[kind].append(outcome)
    return mean_score(
        outcomes,
        by_kind={k: {"value": fmean(v), "n": len(v)} for k, v in sorted(of_kinds.items())},
    )


def on_device(
    inputs: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Inputs where the model takes them; numbers that are no indices in its `dtype`."""
    return {
        name: tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)
        for name, tensor in inputs.items()
    }
