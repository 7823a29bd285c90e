"""Presets: the literature's grids by name, and the numbers that papers print for them.

A preset is a file here. Under the name of a command, `sweep` or `classify`, is the part of the
command line that it stands for; `published` are tables as their sources print them. Where sources
disagree all are kept, each under its lineage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from ...prune.errors import VlmpruneError, did_you_mean
from ..words.typed import parse_fields

__all__ = [
    "Benchmark",
    "Preset",
    "Published",
    "UnknownPresetError",
    "benchmarks",
    "preset",
    "preset_names",
    "reported_metrics",
    "sources",
]

COMMANDS = ("sweep", "classify")
_BENCHMARKS = "benchmarks"  # the one file here that is no preset


class UnknownPresetError(VlmpruneError, KeyError):
    """A preset that no file describes.

    Symptom: `sweep --preset` stops; near names are in the message.
    Cause: a spelling.
    Type: `vlmprune presets` for all of them.
    Page: ERRORS.md#unknownpreseterror
    """

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


@dataclass(frozen=True)
class Benchmark:
    """What papers report under a short name, and where a record has it.

    Attributes:
        full: the top of the papers' scale, 100 for percentages.
        metric: the record's metric; `a+b` where papers report the sum of two.
        number: where it is no metric, the name of the value in reports' CSV, which `per` divides.
        note: how the papers' protocol differs from the task's; empty where it does not.
    """

    name: str
    task: str
    full: float
    metric: str = ""
    number: str = ""
    per: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Published:
    """One number of one paper.

    Attributes:
        method: its name, `dense` for the model without pruning.
        fields: those that are not at their defaults.
        budget: as on the command line; None for `dense`.
        value: on the paper's scale, see `benchmark.full`.
        lineage: whose runs these are.
        source: paper and table, or repository, file and commit.
    """

    method: str
    fields: Mapping[str, object]
    budget: str | None
    benchmark: Benchmark
    value: float
    lineage: str
    source: str
    note: str = ""

    @property
    def task(self) -> str:
        return self.benchmark.task

    @property
    def metric(self) -> str:
        return self.benchmark.metric


@dataclass(frozen=True)
class Preset:
    """A grid of the literature.

    Attributes:
        command: which command it is a part of.
        flags: what it sets of that, by the name of the flag.
        tokens: visual tokens of an image, where their number is fixed or bounded.
        models: names of the model, without organisation.
    """

    name: str
    about: str
    command: str
    flags: Mapping[str, Any]
    tokens: int | None
    models: tuple[str, ...]
    published: tuple[Published, ...]

    @property
    def model(self) -> str:
        return str(self.flags["model"])

    @property
    def methods(self) -> tuple[str, ...]:
        return tuple(self.flags["methods"])

    @property
    def budgets(self) -> tuple[str, ...]:
        return tuple(str(budget) for budget in self.flags["budgets"])

    @property
    def tasks(self) -> tuple[str, ...]:
        """Those that it names, or else those of its published numbers."""
        return tuple(self.flags.get("tasks") or dict.fromkeys(e.task for e in self.published))


def preset_names() -> list[str]:
    """All presets, sorted."""
    found = (file.name for file in files(__name__).iterdir())
    names = (name.removesuffix(".yaml") for name in found if name.endswith(".yaml"))
    return sorted(name for name in names if name != _BENCHMARKS)


@cache
def preset(name: str) -> Preset:
    """The preset of this name.

    Raises:
        UnknownPresetError: there is none; the nearest are named.
    """
    if name not in preset_names():
        raise UnknownPresetError(f"Unknown preset {name!r}. {did_you_mean(name, preset_names())}")
    content = _read(name)
    (command,) = (each for each in COMMANDS if each in content)
    return Preset(
        name=name,
        about=content["about"],
        command=command,
        flags=content[command],
        tokens=content.get("tokens"),
        models=tuple(content["models"]),
        published=tuple(entry for table in content["published"] for entry in _entries(table)),
    )


@cache
def benchmarks() -> dict[str, Benchmark]:
    """By the name that papers give them."""
    return {name: Benchmark(name, **entry) for name, entry in _read(_BENCHMARKS).items()}


def reported_metrics() -> dict[str, str]:
    """By task, the metric that most papers report, as `Benchmark.metric`."""
    return {each.task: each.metric for each in reversed(benchmarks().values()) if each.metric}


def _entries(table: Mapping[str, Any]) -> list[Published]:
    columns = [benchmarks()[name] for name in table["columns"]]
    return [
        Published(
            method=method,
            fields=fields,
            budget=None if budget is None else str(budget),
            benchmark=benchmark,
            value=float(value),
            lineage=table["lineage"],
            source=table["source"],
            note=table.get("note", ""),
        )
        for word, budget, *values in table["rows"]
        for method, fields in [_method(word)]
        for benchmark, value in zip(columns, values, strict=True)
        if value is not None
    ]


def _method(word: str) -> tuple[str, dict[str, object]]:
    name, *fields = word.split(":")
    return name, parse_fields(fields)


def _read(name: str) -> Any:
    return yaml.safe_load((files(__name__) / f"{name}.yaml").read_text(encoding="utf-8"))


def sources(entries: Sequence[Published]) -> list[str]:
    """Their sources, each once, behind the lineage."""
    return list(dict.fromkeys(f"{entry.lineage}: {entry.source}" for entry in entries))
