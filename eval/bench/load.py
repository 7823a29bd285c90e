"""Clients that ask at once, each in a thread of its own, each anew as soon as it is answered; and
what their waiting comes to."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..results.statistics import spread
from ..words.parts import Parts
from ..words.said import parts_text

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Asked:
    """Seconds of one request, from when its client asked."""

    first_token: float
    answered: float
    new_tokens: int
    prompt_tokens: int | None = None
    """As the server counts them; None where nobody does."""

    @property
    def per_token(self) -> float | None:
        """Of each token behind the first; None: there is none."""
        later = self.new_tokens - 1
        return (self.answered - self.first_token) / later if later else None


@dataclass(frozen=True)
class Load:
    """One round of one variant."""

    seconds: float
    asked: list[Asked]

    @property
    def throughput(self) -> float:
        """Requests a second."""
        return len(self.asked) / self.seconds


Round = Callable[[Parts, int, int], Load]
"""One round of a variant: so many clients with so many requests each."""


@dataclass
class UnderLoad:
    """A variant at one number of clients, round by round, beside the dense model's rounds."""

    parts: Parts
    clients: int
    loads: list[Load] = field(default_factory=list)
    dense: list[Load] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        asked = [one for load in self.loads for one in load.asked]
        pairs = list(zip(self.loads, self.dense, strict=True))
        steps = [one.per_token for one in asked if one.per_token is not None]
        return {
            "name": parts_text(self.parts),
            "clients": self.clients,
            "requests": len(asked),
            "prompt_tokens": asked[0].prompt_tokens,
            "throughput": spread([load.throughput for load in self.loads]),
            "throughput_over_dense": spread([a.throughput / b.throughput for a, b in pairs]),
            "first_token": percentiles([one.first_token for one in asked]),
            "per_token": percentiles(steps) if steps else None,
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


def under_load(ask: Callable[[int], Asked], *, clients: int, requests: int) -> Load:
    """Let `clients` ask `requests` times each.

    Args:
        ask: one request, given its number among all of this round.

    Raises:
        Exception: what stopped a client first.
    """
    asked: list[Asked] = []
    failures: list[BaseException] = []
    ready = threading.Barrier(clients + 1)

    def client(number: int) -> None:
        ready.wait()
        try:
            for turn in range(requests):
                asked.append(ask(number * requests + turn))
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return Load(time.perf_counter() - started, asked)
