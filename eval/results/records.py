"""One finished cell, as the result file holds it, and what is read from it.

A cell's id hashes its whole configuration, so that a later run knows what is already there.
Versions and hardware are recorded, not hashed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, NotRequired, TypedDict

from ...prune.errors import VlmpruneError
from ...prune.shipped import VERSIONS, settled
from ..sources import UNKNOWN, Source
from ..words.parts import Part
from ..words.said import budget_word, changed_fields
from .statistics import Score, Spread

Status = Literal["ok", "failed", "not_applicable"]
ANSWERS, CLASSES = "answers", "classes"
"""Kinds of tasks: questions about pictures, and pictures to be classified."""


class ResultsError(VlmpruneError, ValueError):
    """A result file that cannot be read or written.

    Symptom: `report`, `read_records` or a sweep stops at a file or folder.
    Cause: it is no result of `sweep` or `classify`, has no cells yet, or may not be written.
    Type: `vlmprune sweep -o DIR` first, then `vlmprune report DIR`.
    Page: ERRORS.md#resultserror
    """


class MethodRecord(TypedDict):
    """A method with the values of its fields, and its budget (None: the paper's own schedule).

    What its code is: for a shipped method `version`, left out while it is 1; for all others
    `source`, a hash, or `UNKNOWN`.
    """

    name: str
    fields: dict[str, object]
    budget: dict[str, object] | None
    version: NotRequired[int]
    source: NotRequired[str]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a cell's outcome. No `methods` is the dense model.

    `kinds` (sorted): the kinds of questions that are asked; None for all. `model_args`: how model
    and processor were loaded beyond the other fields. `max_new_tokens`: the longest answer; None
    where none is written. `task_kind`: which of `task_kinds` the task is of. `batch_size`: where
    times are of batches; None where they are of single samples. Ids do not tell of those that are
    as here.
    """

    model: str
    fingerprint: str
    methods: tuple[MethodRecord, ...]
    positions: str | None
    task: str
    task_version: str
    limit: int | None
    seed: int
    dtype: str
    attn_implementation: str
    max_new_tokens: int | None = None
    kinds: tuple[str, ...] | None = None
    model_args: Mapping[str, object] | None = None
    task_kind: str = ANSWERS
    batch_size: int | None = None

    @property
    def id(self) -> str:
        """The first 16 hex digits of the sha256 of the configuration."""
        text = json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        """The configuration as it comes back from the file."""
        values = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        }
        return json.loads(json.dumps(values, default=str))

    @property
    def known(self) -> bool:
        """Whether another run can be told to be the same: all code that matters has a hash."""
        sources = [method.get("source") for method in self.methods]
        return UNKNOWN not in sources and not self.task_version.endswith(UNKNOWN)

    @property
    def setting(self) -> tuple[object, ...]:
        """What two cells share when their scores may be compared question by question."""
        shared = {k: v for k, v in self.as_json().items() if k not in ("methods", "positions")}
        return tuple(sorted((key, str(value)) for key, value in shared.items()))


def method_record(part: Part) -> MethodRecord:
    method, budget = part.method, part.budget
    fields = {**method.fields(), **method.retired}
    as_before = [name for name, value in method.gained.items() if fields[name] == value]
    record = MethodRecord(
        name=method.name,
        fields={name: value for name, value in fields.items() if name not in as_before},
        budget={"word": budget.word, "value": budget.value} if budget else None,
    )
    version = VERSIONS[shipped] if (shipped := settled(type(method).__module__)) else 1
    if version != 1:
        record["version"] = version
    if source := Source(type(method)).hash:
        record["source"] = source
    return record


class Example(TypedDict):
    """A question as a cell answered it. `picture`: what was kept, a file below the folder of the
    result file."""

    id: str | int
    question: str
    answer: str
    prediction: str
    score: float | None
    picture: str | None


class Tokens(TypedDict):
    """Visual tokens, means: per image (`in`, `kept`) and per sample (`average`, `per_layer`).

    `average_per_layer` counts the tokens that enter a layer, as our budgets do;
    `average_after_cuts`, as SparseVLM and those who compare with it do, those that are left behind
    it, after a cut between it and the next (not in older records). `cache_per_image`, of methods
    on the KV cache: visual entries that a layer has left for a new token after the prompt, a mean
    over layers (not in older records).
    """

    in_per_image: float
    kept_per_image: float
    cache_per_image: NotRequired[float]
    average_per_layer: float
    average_after_cuts: NotRequired[float]
    per_layer: list[float]
    text: float
    generated: float


def cache_text(tokens: Tokens) -> str:
    """What is left in the cache, to end a text about tokens; empty without such a method."""
    left = tokens.get("cache_per_image")
    return "" if left is None else f", {left:.4g} in cache"


class FlopsRecord(TypedDict):
    """Means per sample, as `eval/measure/flops.py` counts. `visual*` is the literature's."""

    vision: float
    projector: float
    prefill: float
    lm_head: float
    decode: float
    first_token: float
    visual: float
    visual_share: float
    prefill_share: float
    first_token_share: float


class Times(TypedDict):
    """Seconds at batch 1; None where nothing could be measured.

    `dense_first_token` and the ratio `share_of_dense` come from dense runs between the cell's own.
    """

    first_token: Spread | None
    vision: Spread | None
    select: Spread | None
    prefill: Spread | None
    per_decoded_token: Spread | None
    dense_first_token: Spread | None
    share_of_dense: Spread | None


class WhereKept(TypedDict):
    """In how many percent of `images` a token was kept over each point of a raster of `side` rows
    and columns, in reading order."""

    side: int
    images: int
    percent: list[int]


class EvidenceKept(TypedDict):
    """Which share was kept of the patches that a question is about, where a task knows them: a mean
    over `questions`, and over those that were answered right and wrong (None: there are none)."""

    mean: float
    right: float | None
    wrong: float | None
    questions: int


class Measured(TypedDict):
    """What a cell of questions yields. `scores` are by metric, the task's main one first;
    `answers`, one digest a question, tell whether two cells said the same; `where` and `evidence`
    are of methods that drop tokens (none of these in older records); `kept_alike`, of second turns,
    is the share of tokens that both questions of a couple keep."""

    scores: dict[str, Score]
    tokens: Tokens
    flops: FlopsRecord
    times: Times
    kv_bytes: float
    peak_memory_bytes: int | None
    positions: str | None
    notes: list[str]
    examples: list[Example]
    answers: NotRequired[list[str]]
    where: NotRequired[WhereKept]
    evidence: NotRequired[EvidenceKept]
    kept_alike: NotRequired[float]


class PictureTokens(TypedDict):
    """Patches of a picture, or groups of them, means: CLS is not counted.

    `average_per_layer` counts those that enter a block, and `per_layer` is by block: the mean of
    what its attention and its MLP see.
    """

    in_per_image: float
    kept_per_image: float
    average_per_layer: float
    per_layer: list[float]


class PictureFlops(TypedDict):
    """Of one picture, as torch counts the first batch: `forward`, and as a share of dense."""

    forward: float
    forward_share: float


class PictureTimes(TypedDict):
    """Seconds a picture, of forward passes of whole batches; None where nothing was measured.

    `dense_picture` and the ratio `share_of_dense` come from dense runs of the same batches in turn.
    """

    picture: Spread | None
    dense_picture: Spread | None
    share_of_dense: Spread | None


class MeasuredClasses(TypedDict):
    """What a cell of pictures yields. `tokens`: None of a model without patches."""

    scores: dict[str, Score]
    tokens: PictureTokens | None
    flops: PictureFlops
    times: PictureTimes
    peak_memory_bytes: int | None
    positions: str | None
    notes: list[str]
    examples: list[Example]
    answers: NotRequired[list[str]]


class Record(TypedDict, total=False):
    """One line of the file. `config` is `Config` as JSON; a failed cell has `error`, no numbers.

    What `tokens`, `flops` and `times` hold is of the kind of task: `Measured`, `MeasuredClasses`.
    """

    schema: int
    id: str
    status: Status
    config: dict[str, Any]
    finished: str
    seconds: float
    batch_size: int
    load_average: float | None
    scores: dict[str, Score]
    tokens: Mapping[str, Any]
    flops: Mapping[str, Any]
    times: Mapping[str, Any]
    kv_bytes: float
    peak_memory_bytes: int | None
    positions: str | None
    notes: list[str]
    examples: list[Example]
    answers: list[str]
    where: WhereKept
    evidence: EvidenceKept
    kept_alike: float
    error: dict[str, str]
    versions: dict[str, str]
    hardware: dict[str, object]
    asked: str
    """When a sweep last found it finished, where another code of its methods was in its place."""
    earlier: int
    """How many cells of another code of its methods are not shown beside it; set when read."""
    given: dict[str, Any]
    """Flags of the command that its configuration does not tell; missing if run from Python."""


# --- Read from a record ----------------------------------------------------------------------


def setting_of(record: Mapping[str, Any]) -> tuple[object, ...]:
    """`Config.setting` of a record."""
    return Config(**record["config"]).setting


def main_score(record: Mapping[str, Any]) -> tuple[str, Score]:
    """The task's main metric and what a finished cell has of it."""
    return next(iter(record["scores"].items()))


def method_name(record: Mapping[str, Any]) -> str:
    """The names of the methods, joined by `+`, or `dense`."""
    return "+".join(m["name"] for m in record["config"]["methods"]) or "dense"


def variant(record: Mapping[str, Any]) -> str:
    """The method, with the fields that differ from their defaults and the positions if given."""
    config = record["config"]
    names = []
    for entry in config["methods"]:
        changed = changed_fields(entry["name"], entry["fields"], config["seed"])
        names.append(f"{entry['name']}({', '.join(changed)})" if changed else entry["name"])
    positions = f" [{config['positions']}]" if config["positions"] and names else ""
    return ("+".join(names) or "dense") + positions


def budget_text(record: Mapping[str, Any]) -> str:
    """The budgets as the command line writes them, one a method."""
    return "+".join(budget_word(m["budget"]) for m in record["config"]["methods"])


def latest(records: Sequence[Record]) -> list[Record]:
    """Of cells that only the code of their methods tells apart, the one that was used last.

    What stays says in `earlier` how many it stands for.
    """
    shown: dict[str, Record] = {}
    for record in records:
        place = json.dumps(_without_code(record.get("config", {})), sort_keys=True)
        if (other := shown.get(place)) is not None:
            old, record = sorted((other, record), key=_used)
            record = record.copy()
            record["earlier"] = record.get("earlier", 0) + old.get("earlier", 0) + 1
        shown[place] = record
    return list(shown.values())


def earlier_text(records: Sequence[Record]) -> str | None:
    """Whose cells of another code are not shown, if there are any."""
    counts: dict[str, int] = {}
    for record in records:
        if record.get("earlier"):
            name = variant(record)
            counts[name] = counts.get(name, 0) + record["earlier"]
    listed = ", ".join(f"{name} ({n} cell{'s' * (n > 1)})" for name, n in counts.items())
    return f"measured with another version of the method, not shown: {listed}" if counts else None


def _without_code(config: Mapping[str, Any]) -> dict[str, Any]:
    methods = [
        {key: value for key, value in method.items() if key not in ("version", "source")}
        for method in config.get("methods", ())
    ]
    return {**config, "methods": methods}


def _used(record: Record) -> tuple[str, bool]:
    return record.get("asked") or record.get("finished", ""), "asked" in record
