"""Results in files of the shape that lm-eval and lmms-eval write, for the tools that read them.

`<folder>/<model>/results_<time>.json` and `samples_<task>_<time>.jsonl`, one pair a finished cell.
What those tools do not know of (method, tokens, FLOPs, times) is under the one key `pruning`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from ..results.records import Record, ResultsError, main_score
from ..results.statistics import Score
from .cells import Cell, Section
from .files import NoFileError, file_below
from .repeat import command_of

FILTER = "none"


@dataclass
class Written:
    """What `write` did: its files, and the cells whose answers were not logged, with the reason."""

    files: list[Path] = field(default_factory=list)
    without_samples: list[tuple[Cell, str]] = field(default_factory=list)
    left_out: list[Cell] = field(default_factory=list)


def write(sections: Sequence[Section], folder: Path) -> Written:
    """Write all finished cells below `folder`.

    Raises:
        ResultsError: a cell's time or its samples cannot be read.
        OSError: the folder cannot be written to.
    """
    written = Written()
    taken: set[tuple[str, datetime]] = set()
    cells = [(section, cell) for section in sections for cell in section.cells]
    for section, cell in sorted(cells, key=lambda pair: pair[1].record["finished"]):
        if not cell.ok:
            written.left_out.append(cell)
            continue
        target = folder / file_word(cell.record["config"]["model"])
        time = _time(cell)
        # Readers take the time for a file's name: cells of the same second stay apart.
        while (target.name, time) in taken:
            time += timedelta(microseconds=1)
        taken.add((target.name, time))
        stamp = time.isoformat(timespec="microseconds").replace(":", "-").partition("+")[0]
        target.mkdir(parents=True, exist_ok=True)
        samples: list[dict[str, Any]] | None
        try:
            samples = read_samples(cell)
        except NoFileError as reason:
            samples = None
            written.without_samples.append((cell, str(reason)))
        result = results(section, cell, samples)
        file = target / f"results_{stamp}.json"
        file.write_text(json.dumps(result, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        written.files.append(file)
        if samples is not None:
            task = file_word(cell.record["config"]["task"])
            file = target / f"samples_{task}_{stamp}.jsonl"
            lines = (json.dumps(sample, allow_nan=False) + "\n" for sample in samples)
            file.write_text("".join(lines), encoding="utf-8")
            written.files.append(file)
    return written


def results(
    section: Section, cell: Cell, samples: Sequence[Mapping[str, Any]] | None
) -> dict[str, Any]:
    """The `results_*.json` of a cell."""
    record, config = cell.record, cell.record["config"]
    task, scores = config["task"], record["scores"]
    entry: dict[str, Any] = {"alias": task}
    for name, score in scores.items():
        entry[f"{name},{FILTER}"] = _number(score["value"])
        entry[f"{name}_stderr,{FILTER}"] = standard_error(score)
    n = main_score(record)[1]["n"]
    return {
        "results": {task: entry},
        "group_subtasks": {task: []},
        "configs": {
            task: {
                "task": task,
                "output_type": section.kind.output_type,
                **_generation(config),
                "metric_list": [
                    {"metric": name, "higher_is_better": score["higher_is_better"]}
                    for name, score in scores.items()
                ],
                "metadata": {"version": config["task_version"]},
            }
        },
        "versions": {task: config["task_version"]},
        "n-shot": {task: 0},
        "higher_is_better": {
            task: {name: score["higher_is_better"] for name, score in scores.items()}
        },
        "n-samples": {task: {"original": n, "effective": n}},
        "config": _settings(record),
        "git_hash": None,
        "date": _time(cell).timestamp() - record["seconds"],
        "task_hashes": {task: _hash_of_all(samples)} if samples is not None else {},
        "model_source": "vlmprune",
        "model_name": config["model"],
        "model_name_sanitized": file_word(config["model"]),
        "total_evaluation_time_seconds": str(record["seconds"]),
        "transformers_version": record["versions"].get("transformers"),
        "pruning": _finite(_pruning(section, cell)),
    }


def _settings(record: Record) -> dict[str, Any]:
    """What lm_eval was called with, or would have been."""
    config = record["config"]
    return {
        "model": config["model"],
        "model_args": config.get("model_args") or {},
        "batch_size": record["batch_size"],
        "batch_sizes": [],
        "device": record["hardware"]["device"],
        "use_cache": None,
        "limit": config["limit"],
        "bootstrap_iters": 0,
        "gen_kwargs": {},
        "model_dtype": config["dtype"],
        "model_sha": config["fingerprint"],
        "random_seed": config["seed"],
        "numpy_seed": config["seed"],
        "torch_seed": config["seed"],
        "fewshot_seed": config["seed"],
    }


def _pruning(section: Section, cell: Cell) -> dict[str, Any]:
    """What lm_eval has no words for."""
    record = cell.record
    config, scores = record["config"], record["scores"]
    return {
        "id": record["id"],
        "variant": cell.variant,
        "budget": cell.budget,
        "methods": config["methods"],
        "positions": record["positions"],
        "attn_implementation": config["attn_implementation"],
        **{part: record[part] for part in section.kind.parts},  # type: ignore[literal-required]
        "scores": {
            name: {k: score[k] for k in ("unit", "low", "high", "n", "by_kind")}  # type: ignore[literal-required]
            for name, score in scores.items()
        },
        "vs_dense": {name: section.against_dense(cell, name) for name in scores},
        "notes": record["notes"],
        "versions": record["versions"],
        "hardware": record["hardware"],
        "command": command_of(record),
    }


def _generation(config: Mapping[str, Any]) -> dict[str, Any]:
    """How answers are written, where there are any."""
    longest = config.get("max_new_tokens")
    if longest is None:
        return {}
    return {"generation_kwargs": {"do_sample": False, "max_gen_toks": longest}}


def standard_error(score: Score) -> float | str:
    """Of the mean of the questions' outcomes, or of the resamples; "N/A" as lm-eval says it."""
    if len(score["outcomes"]) > 1:
        return statistics.stdev(score["outcomes"]) / math.sqrt(len(score["outcomes"]))
    if len(score["replicates"]) > 1:
        return statistics.stdev(score["replicates"])
    return "N/A"


def read_samples(cell: Cell) -> list[dict[str, Any]]:
    """The answers of a cell as `samples_*.jsonl` holds them.

    Raises:
        NoFileError: they were not logged.
        ResultsError: the file is none of vlmprune.
    """
    try:
        file = file_below(cell.folder, f"samples/{cell.record['id']}.jsonl")
    except NoFileError as error:
        raise NoFileError("not logged, run the sweep with --log_samples") from error
    metric = main_score(cell.record)[0]
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return [_sample(number, json.loads(line), metric) for number, line in enumerate(lines)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultsError(
            f"{str(file)!r} is no file of samples ({type(error).__name__}: {error}): run the cell "
            f"again with --log_samples, or remove the file."
        ) from error


def _sample(number: int, logged: Mapping[str, Any], metric: str) -> dict[str, Any]:
    doc = {key: logged[key] for key in ("id", "kind", "question", "answer")}
    return {
        "doc_id": number,
        "doc": doc,
        "target": logged["answer"],
        "arguments": {"gen_args_0": {"arg_0": logged["question"], "arg_1": {}}},
        "resps": [[logged["prediction"]]],
        "filtered_resps": [logged["prediction"]],
        "filter": FILTER,
        "metrics": [metric],
        "doc_hash": _hash(json.dumps(doc, sort_keys=True)),
        "prompt_hash": _hash(str(logged["question"])),
        "target_hash": _hash(str(logged["answer"])),
        metric: _number(logged["score"]),
        "kept": logged.get("kept"),
    }


def file_word(name: str) -> str:
    """A name as part of a path, as lm-eval makes it; never a way out of the folder."""
    word = re.sub(r'[\x00-\x1f"<>:/|\\?*\[\]]+', "__", name)[:150]
    return word.strip(". ") or "_"


def _time(cell: Cell) -> datetime:
    finished = cell.record["finished"]
    try:
        return datetime.fromisoformat(finished)
    except ValueError as error:
        raise ResultsError(
            f"Cell {cell.record['id']!r}: finished {finished!r} is no time in ISO 8601."
        ) from error


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_of_all(samples: Sequence[Mapping[str, Any]]) -> str:
    parts = ("doc_hash", "prompt_hash", "target_hash")
    return _hash("".join(sample[part] for sample in samples for part in parts))


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _finite(value: Any) -> Any:
    """The same without what JSON does not know: NaN and infinity become null."""
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return value
