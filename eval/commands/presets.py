"""`vlmprune presets`: tables of the presets and of what they hold."""

from __future__ import annotations

from ..arguments.presets import PresetsRequest
from ..console import stdout
from ..presets import Benchmark, Published, preset, preset_names, sources
from ..table import Table


def run(request: PresetsRequest) -> int:
    """The command. Returns the exit code."""
    (published_table(request.name) if request.name else presets_table()).print(stdout())
    return 0


def presets_table() -> Table:
    """Name, what it is, its model, budgets and tasks, and how many numbers of whom it holds."""
    rows: list[tuple[str, ...]] = []
    for name in preset_names():
        found = preset(name)
        lineages = dict.fromkeys(entry.lineage for entry in found.published)
        rows.append(
            (
                name,
                found.command,
                found.about,
                found.model,
                ", ".join(found.budgets),
                ", ".join(found.tasks),
                f"{len(found.published)} of {', '.join(lineages)}",
            )
        )
    return Table(
        headers=("Preset", "Command", "What", "Model", "Budgets", "Tasks", "Published numbers"),
        rows=rows,
        numbers_from=7,
        notes="\n".join(
            f"Sources of {name}. {'; '.join(sources(preset(name).published))}."
            for name in preset_names()
        ),
        wrapping=(2, 4, 5, 6),
        droppable=(5, 3, 1),
    )


def published_table(name: str) -> Table:
    """A line for every run that a source of the preset reports, a column for every benchmark.

    Raises:
        UnknownPresetError: there is no such preset.
    """
    found = preset(name)
    columns = dict.fromkeys(entry.benchmark for entry in found.published)
    runs: dict[tuple[str, str, str], dict[str, float]] = {}
    for entry in found.published:
        run = (_method(entry), entry.budget or "", entry.lineage)
        runs.setdefault(run, {})[entry.benchmark.name] = entry.value
    notes = [f"{column.name}: {column.note}" for column in columns if column.note]
    remarks = dict.fromkeys(f"{e.lineage}: {e.note}" for e in found.published if e.note)
    return Table(
        headers=("Method", "Budget", "Source", *(column.name for column in columns)),
        rows=[(*run, *(_number(row.get(c.name), c) for c in columns)) for run, row in runs.items()],
        numbers_from=3,
        title=f"{name}: {found.about}",
        notes=(f"Benchmarks. {'; '.join(notes)}.\n\n" if notes else "")
        + f"Runs. {'; '.join(remarks)}.\n\nSources. {'; '.join(sources(found.published))}.",
    )


def _number(value: float | None, benchmark: Benchmark) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if benchmark.full == 100 and value == round(value, 1) else f"{value:g}"


def _method(entry: Published) -> str:
    fields = ", ".join(f"{key}={value}" for key, value in entry.fields.items())
    return f"{entry.method}({fields})" if fields else entry.method
