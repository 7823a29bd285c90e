"""The command line that measures a cell again, and what it needs beside itself."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...prune.amount import PREFIXES, PUBLISHED
from ...prune.contract import ClipText
from ...prune.errors import VlmpruneError
from ..embedded import EMBEDDED, MODELS
from ..embedded.task import shipped_tasks
from ..method_facts import needs_of
from ..results.records import ANSWERS, CLASSES, MethodRecord, Record, method_record
from ..results.task_kinds import kind_of
from ..words.downsample import class_of
from ..words.parts import parse
from ..words.typed import pair

_DTYPES = ("float32", "bfloat16", "float16")


def command_of(record: Record) -> str:
    """The command for one cell, quoted for a shell; dense is run beside it, as always."""
    config, given = record["config"], record.get("given", {})
    seed = config["seed"]
    command = _COMMANDS[kind_of(config).name]
    words: list[object] = ["vlmprune", command.verb]
    words += ["--model", given.get("model", config["model"])]
    processes = record["hardware"].get("processes", 1)
    if processes != 1:
        words[:1] = ["torchrun", "--nproc_per_node", processes, "-m", "vlmprune"]
    if config.get("model_args"):
        words += ["--model_args", ",".join(pair(*arg) for arg in config["model_args"].items())]
    words += command.task(config, given)
    words += ["--methods", _methods_word(config["methods"], seed) or "dense"]
    if config["positions"]:
        words += ["--positions", config["positions"]]
    if config.get("kinds"):
        words += ["--kinds", *config["kinds"]]
    if given.get("imports"):
        words += ["--import", *given["imports"]]
    if given.get("clip"):
        words += ["--clip", given["clip"]]
    words += ["--limit", config["limit"] if config["limit"] is not None else "all"]
    words += ["--seed", seed, "--batch_size", record["batch_size"]]
    words += ["--dtype", config["dtype"], *command.more(config)]
    spread = "accelerators" in record["hardware"]
    words += ["--device", "auto" if spread else record["hardware"]["device"], "-o", "./repeated"]
    return shlex.join(str(word) for word in words)


def needs(record: Record) -> list[str]:
    """What the command does not hold: models, questions and code that are somebody's own."""
    config, given = record["config"], record.get("given")
    found = [need for entry in config["methods"] if (need := _need(entry, config["seed"]))]
    if given is None and config["model"] not in MODELS and "/" not in config["model"]:
        found.append(
            f"model: the folder of {config['model']}, whose weights have the fingerprint "
            f"{config['fingerprint']}"
        )
    found += _COMMANDS[kind_of(config).name].needs(config, given)
    clip = (given or {}).get("clip") or record["status"] != "ok"  # without it: refused
    if not clip and any(map(_reads_clip, config["methods"])):
        found.append("--clip: the CLIP checkpoint of the model's vision tower")
    if config["dtype"] not in _DTYPES:
        found.append(f"a model in {config['dtype']}, which only sweep_model in Python takes")
    return found


@dataclass(frozen=True)
class _Command:
    """What measures a kind of task again: its verb, and what it is given that others are not."""

    verb: str
    task: Callable[[Mapping[str, Any], Mapping[str, Any]], list[object]]
    needs: Callable[[Mapping[str, Any], Mapping[str, Any] | None], list[str]]
    more: Callable[[Mapping[str, Any]], list[object]]


def _question_needs(config: Mapping[str, Any], given: Mapping[str, Any] | None) -> list[str]:
    if given is None and config["task"] not in shipped_tasks():
        return [
            f"task: {config['task']}, version {config['task_version']}; if it is your own, give "
            f"its questions with --data FILE in place of --tasks, or run sweep_model in Python"
        ]
    if given and "data" in given:
        return [f"questions: {given['data']}, in its version {config['task_version']}"]
    return []


def _picture_needs(config: Mapping[str, Any], given: Mapping[str, Any] | None) -> list[str]:
    data = (given or {}).get("data", config["task"])
    if data == EMBEDDED:
        return []
    return [f"pictures: {data}, in its version {config['task_version']}"]


def _picture_words(config: Mapping[str, Any], given: Mapping[str, Any]) -> list[object]:
    return ["--data", given.get("data", config["task"])]


def _task_words(config: Mapping[str, Any], given: Mapping[str, Any]) -> list[object]:
    if "data" in given:
        words = ["--data", given["data"], "--max_new_tokens", config["max_new_tokens"]]
        return [*words, "--matching", given["matching"]]
    if "include_path" in given:
        return ["--tasks", config["task"], "--include_path", given["include_path"]]
    return ["--tasks", config["task"]]


def _methods_word(entries: list[MethodRecord], seed: int) -> str:
    return "+".join(_method_word(entry, seed) for entry in entries)


def _method_word(entry: MethodRecord, seed: int) -> str:
    """A method as `--methods` takes it: the fields that are not at their defaults, the budget."""
    try:
        cls = class_of(entry["name"])
        usual = {**cls.retired, **cls().fields(), "seed": seed}
    except (VlmpruneError, TypeError):  # of another version, a plug-in, or without defaults
        usual = {}
    fields = [
        pair(key, value)
        for key, value in entry["fields"].items()
        if key not in usual or _as_json(value) != _as_json(usual[key])
    ]
    return f"{':'.join([entry['name'], *fields])}@{_budget_word(entry['budget'])}"


def _budget_word(budget: Mapping[str, Any] | None) -> str:
    """In full: a rounded budget is another cell."""
    return f"{PREFIXES.get(budget['word'], '')}{budget['value']}" if budget else PUBLISHED


def _need(entry: MethodRecord, seed: int) -> str | None:
    """What a method's word cannot say."""
    name, source = entry["name"], entry.get("source")
    try:
        (part,) = parse(_method_word(entry, seed), seed)
        now = method_record(part)
    except (VlmpruneError, ValueError):
        now = None
    if now is not None and _as_json(now) == _as_json(entry):
        return f"method: your own {name}, with code {source}, as it is here" if source else None
    if source:
        return (
            f"method: your own {name}, with the code whose hash was {source}: as a plug-in, from a "
            f"file with --import, or in Python with sweep_model"
        )
    if now is not None and entry.get("version") != now.get("version"):
        return (
            f"method: {name} in its version {entry.get('version', 1)} (here: "
            f"{now.get('version', 1)}), of vlmprune as recorded below"
        )
    if now is not None and (added := sorted(now["fields"].keys() - entry["fields"].keys())):
        return (
            f"method: {name} had no field {', '.join(added)} yet: the command takes the default, "
            f"and the cell gets another id"
        )
    return f"method: {name} as recorded below, which cannot be typed or is not known here"


def _reads_clip(entry: MethodRecord) -> bool:
    try:
        cls = class_of(entry["name"])
        known = {key: entry["fields"][key] for key in cls().fields() if key in entry["fields"]}
        return any(isinstance(need, ClipText) for need in needs_of(cls(**known)))
    except (VlmpruneError, TypeError):
        return False


def _as_json(value: object) -> object:
    return json.loads(json.dumps(value, default=str))


_COMMANDS = {
    ANSWERS: _Command(
        "sweep",
        _task_words,
        _question_needs,
        lambda config: ["--attn_implementation", config["attn_implementation"]],
    ),
    CLASSES: _Command("classify", _picture_words, _picture_needs, lambda config: []),
}
