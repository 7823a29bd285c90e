"""The generated tables of the Markdown files, each made of what the code or the stored runs say."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit.error_page import error_page
from kit.paths import ROOT, STORED, TESTS
from kit.skips import skips_table
from vlmprune.eval.bench.bench_table import before_after_table, bench_table, shapes_table
from vlmprune.eval.bench.parts_table import parts_table
from vlmprune.eval.bench.scale_table import scale_table
from vlmprune.eval.bench.select_table import summary_table
from vlmprune.eval.bench.serve_table import serve_table
from vlmprune.eval.commands.methods import methods_table
from vlmprune.eval.commands.models import models_table
from vlmprune.eval.report import markdown
from vlmprune.eval.report.agreement import agreement_table
from vlmprune.eval.report.baselines import beside_baselines, hard_table
from vlmprune.eval.report.cells import Section, read_cells, sections
from vlmprune.eval.report.depths import depths_table
from vlmprune.eval.report.grids import Grid
from vlmprune.eval.report.positions import positions_table
from vlmprune.eval.report.turns import turns_table
from vlmprune.eval.report.where import where_table
from vlmprune.eval.results.store import read_records
from vlmprune.eval.results.sweep_table import accuracy_table, sweep_table

_ONE_FILE_EACH = ("methods", "families", "transcriptions", "training", "golden")
"""Folders whose files are listed elsewhere, or are all alike."""


def _stored(name: str) -> Any:
    return json.loads((STORED / name).read_text())


def _accuracies(name: str) -> str:
    """A stored sweep of many methods, one line a method."""
    return accuracy_table(read_records(STORED / name)).markdown()


def _of_section(name: str, table: Callable[[Section], Grid | None]) -> str:
    """A table of the report of a stored sweep with one setting."""
    (section,) = sections(read_cells([STORED / name]))
    grid = table(section)
    assert grid is not None
    return markdown.table(grid)


def _promises() -> str:
    """Stored runs of `vlmprune bench model`, before and after."""
    runs = ("bench_576", "bench_ragged", "bench_tiles")
    tables = [
        before_after_table(_stored(f"{run}_before.json"), _stored(f"{run}.json")) for run in runs
    ]
    return "\n\n".join(table.markdown() for table in tables)


def _accelerators() -> str:
    """Whatever runs on a GPU are stored."""
    reports = [json.loads(path.read_text()) for path in sorted(STORED.glob("gpu_*.json"))]
    tables = [before_after_table(None, report).markdown() for report in reports]
    return "\n\n".join(tables) or "No run on an accelerator is stored yet: nothing is claimed."


def _features() -> str:
    """What works of generate() on a patched model, as tests hold it."""
    rows: dict[str, dict[str, str]] = json.loads((TESTS / "data" / "features.json").read_text())
    places = list(next(iter(rows.values())))
    lines = [_row("Feature", *places), _row("---", *("---" for _ in places))]
    return "\n".join(lines + [_row(name, *row.values()) for name, row in rows.items()])


def _support() -> str:
    """Which method runs on which model: models on which all methods run alike share a column."""
    rows: dict[str, dict[str, str]] = json.loads((TESTS / "data" / "support.json").read_text())
    alike: dict[tuple[str, ...], list[str]] = {}
    for model in next(iter(rows.values())):
        alike.setdefault(tuple(row[model] for row in rows.values()), []).append(model)
    letters = [chr(ord("A") + number) for number in range(len(alike))]
    lines = [_row("Method", *letters), _row("---", *("---" for _ in letters))]
    lines += [_row(name, *ways) for name, *ways in zip(rows, *alike, strict=True)]
    models = [f"- {x}: {', '.join(of)}" for x, of in zip(letters, alike.values(), strict=True)]
    return "\n".join([*models, "", *lines])


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def first_sentence(path: Path) -> str:
    """What a file of Python says of itself: the first sentence of its docstring."""
    said = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = " ".join(said.partition("\n\n")[0].split())
    return sentence.partition(". ")[0].rstrip(".").replace("|", "\\|")


def _files(room: Path, skipped: tuple[str, ...] = _ONE_FILE_EACH) -> str:
    """Every file of a room and what it says of itself; folders behind the room's own files."""
    lines = [_row("File", "What it says"), _row("---", "---")]
    folders = [room, *(p for p in sorted(room.rglob("*")) if p.is_dir())]
    for folder in folders:
        within = folder.relative_to(room)
        if any(part.startswith((".", "_")) for part in within.parts):
            continue
        if any(part in skipped for part in within.parts[:-1]) or not list(folder.glob("*.py")):
            continue
        files = sorted(folder.glob("*.py"))
        if within.name in skipped:
            files = [file for file in files if file.name == "__init__.py"]
        for file in files:
            name = within if file.name == "__init__.py" else within / file.name
            said = first_sentence(file)
            if said and name != Path("."):
                lines.append(_row(f"`{name.as_posix()}`", said))
    return "\n".join(lines)


GENERATED: dict[str, Callable[[], str]] = {
    "results": lambda: sweep_table(read_records(STORED / "sweep.jsonl")).markdown(),
    "accuracy": lambda: _accuracies("sweep_before_llm.jsonl"),
    "decoder": lambda: _accuracies("sweep_decoder.jsonl"),
    "cache": lambda: _accuracies("sweep_cache.jsonl"),
    "beside": lambda: _of_section("sweep_recent.jsonl", beside_baselines),
    "hard": lambda: _of_section("sweep_recent.jsonl", hard_table),
    "agreement": lambda: _of_section("sweep_recent.jsonl", agreement_table),
    "where": lambda: _of_section("sweep_recent.jsonl", where_table),
    "depths": lambda: _of_section("sweep_depths.jsonl", depths_table),
    "few": lambda: _accuracies("sweep_few.jsonl"),
    "positions": lambda: _of_section("sweep_few.jsonl", positions_table),
    "turns": lambda: _of_section("sweep_turns.jsonl", turns_table),
    "grounding": lambda: _accuracies("sweep_where.jsonl"),
    "grounding_positions": lambda: _of_section("sweep_where.jsonl", positions_table),
    "recent_cache": lambda: _of_section("sweep_recent_cache.jsonl", beside_baselines),
    "speed": lambda: bench_table(_stored("bench_576.json")).markdown(),
    "promises": _promises,
    "accelerators": _accelerators,
    "scale": lambda: scale_table(_stored("bench_scale.json")).markdown(),
    "encoder": lambda: _accuracies("sweep_encoder.jsonl"),
    "classify": lambda: sweep_table(read_records(STORED / "classify.jsonl")).markdown(),
    "encoder_speed": lambda: parts_table(_stored("bench_encoder.json")).markdown(),
    "neurons": lambda: bench_table(_stored("bench_neurons.json")).markdown(),
    "encoder_shares": lambda: parts_table(
        [*_stored("bench_encoders.json"), *_stored("bench_sizes.json")]
    ).markdown(),
    "shapes": lambda: shapes_table(_stored("bench_shapes.json"), "divprune").markdown(),
    "served": lambda: serve_table([_stored("bench_serve_vllm.json")]).markdown(),
    "select": lambda: summary_table(_stored("bench_select.json")).markdown(),
    "methods": lambda: methods_table().markdown(),
    "models": lambda: models_table().markdown(),
    "support": _support,
    "features": _features,
    "errors": error_page,
    "skips": skips_table,
    "files_prune": lambda: _files(ROOT / "prune"),
    "files_adapters": lambda: _files(ROOT / "adapters"),
    "files_eval": lambda: _files(ROOT / "eval"),
    "files_tests": lambda: _files(TESTS, ()),
}
"""Name of a marker -> what stands behind it."""
