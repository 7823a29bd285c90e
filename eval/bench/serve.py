"""A model under load: clients that ask at once, each in a thread of its own, each anew as soon as
it is answered.

All share one model, as threads that serve it do; nothing is batched, which `generate` leaves to its
caller. So waiting times grow with the number of clients, and what pruning saves of a prefill is
saved of the others' waiting, too.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from ..measure.times import Clock
from ..results.statistics import spread
from .variant import Variant

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Asked:
    """Seconds of one request, from when its client asked."""

    first_token: float
    answered: float


@dataclass(frozen=True)
class Load:
    """One round of one variant."""

    seconds: float
    asked: list[Asked]

    @property
    def throughput(self) -> float:
        """Requests a second."""
        return len(self.asked) / self.seconds


@dataclass
class UnderLoad:
    """A variant at one number of clients, round by round, beside the dense model's rounds."""

    variant: Variant
    clients: int
    loads: list[Load] = field(default_factory=list)
    dense: list[Load] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        asked = [one for load in self.loads for one in load.asked]
        pairs = list(zip(self.loads, self.dense, strict=True))
        return {
            "name": self.variant.name,
            "clients": self.clients,
            "requests": len(asked),
            "throughput": spread([load.throughput for load in self.loads]),
            "throughput_over_dense": spread([a.throughput / b.throughput for a, b in pairs]),
            "first_token": percentiles([one.first_token for one in asked]),
            "answered": percentiles([one.answered for one in asked]),
            "first_token_over_dense": spread([_middle(a) / _middle(b) for a, b in pairs]),
        }


def _middle(load: Load) -> float:
    return statistics.median(one.first_token for one in load.asked)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Of seconds, by `PERCENTILES`; of a few, the nearest that was measured from above."""
    ordered = sorted(values)
    at = {p: -(-p * len(ordered) // 100) - 1 for p in PERCENTILES}
    return {f"p{p}": ordered[max(0, index)] for p, index in at.items()}


def serve(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    *,
    clients: int,
    requests: int,
    new_tokens: int,
) -> Load:
    """Let `clients` ask `requests` times each.

    Raises:
        Exception: what stopped a client first.
    """
    asked: list[Asked] = []
    failures: list[BaseException] = []
    ready = threading.Barrier(clients + 1)

    def client() -> None:
        ready.wait()
        try:
            for _ in range(requests):
                asked.append(_ask(model, inputs, new_tokens))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Load(time.perf_counter() - started, asked)


@torch.inference_mode()
def _ask(model: PreTrainedModel, inputs: Mapping[str, Tensor], new_tokens: int) -> Asked:
    clock = Clock(model.get_input_embeddings().weight.device)
    started = time.perf_counter()
    model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([clock]),
    )
    return Asked(clock.stamps[0] - started, time.perf_counter() - started)
