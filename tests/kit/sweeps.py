"""Sweeps whose cells cost nothing: a runner that answers at once, or fails where it is told to."""

from __future__ import annotations

import dataclasses

from vlmprune.eval.results import records as results
from vlmprune.eval.results import statistics as stats
from vlmprune.eval.results.records import Config, method_record
from vlmprune.eval.results.store import Store
from vlmprune.eval.sweep.grid import Cell, sweep
from vlmprune.eval.words.parts import grid, parse, parse_budgets
from vlmprune.prune.contract import CacheMethod

VERSIONS = {"vlmprune": "0.1.0", "torch": "2"}
HARDWARE = {"device": "cpu", "cpu": "a processor", "cpu_cores": 2, "torch_threads": 1}
BASE = Config(
    model="m",
    fingerprint="f",
    methods=(),
    positions=None,
    task="t",
    task_version="1",
    limit=4,
    seed=0,
    max_new_tokens=4,
    dtype="float32",
    attn_implementation="sdpa",
)


def cells(*words: str, budgets=("0.5", "0.25")) -> list[Cell]:
    return [
        Cell(dataclasses.replace(BASE, methods=tuple(map(method_record, parts))), parts)
        for parts in grid([parse(word) for word in words], parse_budgets(budgets))
    ]


def measured(outcomes: str = "1101", share: float = 1.0) -> dict:
    spread = stats.spread([0.010, 0.012, 0.011])
    return {
        "scores": {
            "accuracy": stats.mean_score(
                [float(c) for c in outcomes], by_kind={"what": {"value": 1.0, "n": 2}}
            )
        },
        "tokens": {
            "in_per_image": 196.0,
            "kept_per_image": 196 * share,
            "average_per_layer": 196 * share,
            "per_layer": [196 * share] * 2,
            "text": 10.0,
            "generated": 2.0,
        },
        "flops": {
            "vision": 1e9,
            "projector": 1e8,
            "prefill": 2e9 * share,
            "lm_head": 1e6,
            "decode": 1e7,
            "first_token": 3.1e9 * share,
            "visual": 1e9 * share,
            "visual_share": share,
            "prefill_share": share,
            "first_token_share": share,
        },
        "times": dict.fromkeys(results.Times.__annotations__, spread),
        "kv_bytes": 2048.0,
        "peak_memory_bytes": None,
        "positions": None,
        "notes": [],
        "examples": [],
    }


class Runner:
    """Stands for the evaluation of a cell; raises what it is told to at the given cells."""

    def __init__(self, **raises: BaseException) -> None:
        self.raises = raises
        self.ran: list[str] = []

    def __call__(self, cell: Cell) -> dict:
        name = "+".join(part.method.name for part in cell.parts) or "dense"
        if name in self.raises:
            raise self.raises[name]
        self.ran.append(str(cell))
        return measured(share=cell.calls[-1].budget.value if cell.parts else 1.0)


def go(grid_, runner, folder, versions=VERSIONS, hardware=HARDWARE, **options):
    ran_on = {"versions": versions, "hardware": hardware}
    return sweep(grid_, runner, Store(folder), batch_size=2, **ran_on, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cached(CacheMethod):
    name = "cached"

    def needs(self, shape):
        return ()
