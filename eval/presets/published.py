"""Which published numbers stand beside a measured one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ...prune.budget import PUBLISHED, Budget
from ...prune.contract import Place
from ...prune.errors import VlmpruneError
from ...prune.registry import method_class
from ..words.said import changed_fields
from . import Preset, Published, preset, preset_names

_SAME = 5e-3  # 0.333 of 576 tokens are meant to be 192


def published_for(
    record: Mapping[str, Any], presets: Iterable[Preset] | None = None
) -> list[Published]:
    """The published numbers of the record's model, task, method and budget.

    Models are the same up to organisation and spelling (`-hf`). Fields other than those of the
    published run must be at their defaults, and positions not chosen. A method that is done
    before the LLM has as many tokens in every layer: `192`, `avg:192` and a third of 576 are one
    budget of it. Numbers are of whole tasks: of a record with a `limit` they are a rough guide.

    Args:
        presets: where to look; all of them if not given.
    """
    found = [preset(name) for name in preset_names()] if presets is None else presets
    return [
        entry
        for among in found
        if _model(record["config"]["model"]) in map(_model, among.models)
        for entry in among.published
        if entry.task == record["config"]["task"] and _same_run(entry, record, among.tokens)
    ]


def _model(name: str) -> str:
    return name.replace("\\", "/").rstrip("/").split("/")[-1].lower().removesuffix("-hf")


def _same_run(entry: Published, record: Mapping[str, Any], tokens: int | None) -> bool:
    methods = record["config"]["methods"]
    if not methods:
        return entry.method == "dense"
    if len(methods) > 1 or methods[0]["name"] != entry.method or record["config"]["positions"]:
        return False
    (method,) = methods
    given = {key: method["fields"].get(key) for key in entry.fields}
    others = {key: value for key, value in method["fields"].items() if key not in entry.fields}
    return (
        given == dict(entry.fields)
        and not changed_fields(entry.method, others, record["config"]["seed"])
        and _same_budget(entry, method["budget"], tokens)
    )


def _same_budget(entry: Published, budget: Mapping[str, Any] | None, tokens: int | None) -> bool:
    if entry.budget == PUBLISHED or entry.budget is None or budget is None:
        return entry.budget == PUBLISHED and budget is None
    meant, given = Budget.parse(entry.budget), Budget(budget["word"], budget["value"])
    if meant.word == given.word:
        return math.isclose(meant.value, given.value, rel_tol=_SAME)
    if not _before_llm(entry.method):
        return False
    counts = [_count(each, tokens) for each in (meant, given)]
    return None not in counts and math.isclose(*counts, rel_tol=_SAME)  # type: ignore[arg-type]


def _count(budget: Budget, tokens: int | None) -> float | None:
    if budget.word in ("keep_tokens", "average_tokens"):
        return budget.value
    return budget.value * tokens if budget.word == "keep_ratio" and tokens else None


def _before_llm(name: str) -> bool:
    try:
        return method_class(name)().places == (Place.BEFORE_LLM,)
    except VlmpruneError:  # recorded by a version that knew this method
        return False
