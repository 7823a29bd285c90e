"""The result file: `runs.jsonl`, one finished cell a line, appended at once and never rewritten.

A cell's id hashes its whole configuration, so that a later run knows what is already there.
Versions and hardware are recorded, not hashed.

The schema counts what older readers would misread or trip over; fields that they may ignore do not
change it. Older schemas are brought up to date when they are read. 2: `config` may hold `kinds`.
3: `scores` by metric in place of `accuracy`, `examples`, and `config` may hold `model_args`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from ...prune.amount import PREFIXES, PUBLISHED
from ...prune.errors import VlmpruneError
from ...prune.methods import VERSIONS, settled
from ...prune.registry import method_class
from ..sources import UNKNOWN, Source
from ..words import Part
from .statistics import Score, Spread

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 3
FILE_NAME = "runs.jsonl"

Status = Literal["ok", "failed", "not_applicable"]


class ResultsError(VlmpruneError, ValueError):
    """A result file that cannot be read or written."""


class UnwrittenError(ResultsError):
    """A finished cell that the disk does not take; `record` is what was measured."""

    def __init__(self, message: str, record: Record) -> None:
        super().__init__(message, record)
        self.record = record

    def __str__(self) -> str:
        return str(self.args[0])


# --- One cell --------------------------------------------------------------------------------


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
    and processor were loaded beyond the other fields. Ids do not tell of either where it is None.
    """

    model: str
    fingerprint: str
    methods: tuple[MethodRecord, ...]
    positions: str | None
    task: str
    task_version: str
    limit: int | None
    seed: int
    max_new_tokens: int
    dtype: str
    attn_implementation: str
    kinds: tuple[str, ...] | None = None
    model_args: Mapping[str, object] | None = None

    @property
    def id(self) -> str:
        """The first 16 hex digits of the sha256 of the configuration."""
        text = json.dumps(self.as_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def as_json(self) -> dict[str, Any]:
        """The configuration as it comes back from the file."""
        values = asdict(self)
        for optional in ("kinds", "model_args"):
            if values[optional] is None:
                del values[optional]
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
    record = MethodRecord(
        name=method.name,
        fields=method.fields(),
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


class Measured(TypedDict):
    """What running a cell yields. `scores` are by metric, the task's main one first."""

    scores: dict[str, Score]
    tokens: Tokens
    flops: FlopsRecord
    times: Times
    kv_bytes: float
    peak_memory_bytes: int | None
    positions: str | None
    notes: list[str]
    examples: list[Example]


class Record(TypedDict, total=False):
    """One line of the file. `config` is `Config` as JSON; a failed cell has `error`, no numbers."""

    schema: int
    id: str
    status: Status
    config: dict[str, Any]
    finished: str
    seconds: float
    batch_size: int
    load_average: float | None
    scores: dict[str, Score]
    tokens: Tokens
    flops: FlopsRecord
    times: Times
    kv_bytes: float
    peak_memory_bytes: int | None
    positions: str | None
    notes: list[str]
    examples: list[Example]
    error: dict[str, str]
    versions: dict[str, str]
    hardware: dict[str, object]
    asked: str
    """When a sweep last found it finished, where another code of its methods was in its place."""
    earlier: int
    """How many cells of another code of its methods are not shown beside it; set when read."""
    given: dict[str, Any]
    """Flags of the command that its configuration does not tell; missing if run from Python."""


class Results(list[Record]):
    """The records of a sweep, one a cell: a list, and `to_frame()` as a table to calculate with."""

    def to_frame(self) -> pd.DataFrame:
        """One row a cell; see `frame.to_frame`.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        from .frame import to_frame

        return to_frame(self)


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


def parts_text(parts: Sequence[Part], seed: int = 0) -> str:
    """Methods with changed fields and budgets, e.g. `fastv(layer=3, keep_ratio=0.25)`, or dense."""
    return "+".join(_part_text(part, seed) for part in parts) or "dense"


def _part_text(part: Part, seed: int) -> str:
    name = part.method.name
    said = changed_fields(name, part.method.fields(), seed)
    said.append(str(part.budget) if part.budget else PUBLISHED)
    return f"{name}({', '.join(said)})"


def changed_fields(name: str, fields: Mapping[str, object], seed: int) -> list[str]:
    """`field=value` of every field that is not at its default (a `seed`: not the sweep's)."""
    try:
        usual = method_class(name)().fields() | {"seed": seed}
    except (VlmpruneError, TypeError):  # recorded by a version that knew this method
        return []
    return [
        f"{k}={_as_read(v)}"
        for k, v in fields.items()
        if k in usual and _as_read(v) != _as_read(usual[k])
    ]


def _as_read(value: object) -> object:
    """A field's value as it comes back from the file."""
    return list(value) if isinstance(value, tuple) else value


def budget_text(record: Mapping[str, Any]) -> str:
    """The budgets as the command line writes them, one a method."""
    return "+".join(_budget_word(m["budget"]) for m in record["config"]["methods"])


def _budget_word(budget: Mapping[str, Any] | None) -> str:
    return f"{PREFIXES.get(budget['word'], '')}{budget['value']:g}" if budget else PUBLISHED


# --- The file --------------------------------------------------------------------------------


class Store:
    """Appends records to `runs.jsonl` in a folder and reads them back."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE_NAME
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._end_torn_line()
        except OSError as error:
            raise ResultsError(
                f"Results cannot be written to {folder} ({error.strerror}): choose another folder "
                f"with --output_path."
            ) from error

    def append(self, record: Record) -> None:
        """Write one line, on the disk when this returns; or nothing of it.

        Raises:
            UnwrittenError: the disk is full, or the file cannot be written any more.
        """
        line = json.dumps(record, default=str, allow_nan=False) + "\n"
        try:
            with open(self.path, "ab", buffering=0) as file:
                start = file.tell()
                try:
                    _write_all(file, line.encode())
                    os.fsync(file.fileno())
                except OSError:
                    file.truncate(start)
                    raise
        except OSError as error:
            raise UnwrittenError(
                f"{self.path} cannot be written ({error.strerror}), so that the sweep ends here: "
                f"make room, then the same command goes on.",
                record,
            ) from error

    def read(self) -> list[Record]:
        """The last record of every id, of any code; see `read_records`."""
        return list(_read(self.path).values()) if self.path.exists() else []

    def _end_torn_line(self) -> None:
        """Give a line that an interrupt cut short its end, so that the next one starts afresh."""
        if not self.path.exists() or not self.path.stat().st_size:
            return
        with open(self.path, "rb+") as file:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def _write_all(file: FileIO, content: bytes) -> None:
    while content:
        content = content[file.write(content) :]


def read_records(path: str | os.PathLike[str]) -> Results:
    """The last record of every id, in the order in which ids first appeared; of a method that was
    edited in between only the cells of the code that a sweep used last (see `latest`).

    A line that an interrupt tore is left out: that cell counts as not run.

    Args:
        path: a `runs.jsonl`, or the folder that it is in.

    Raises:
        ResultsError: there is no such file, or a newer vlmprune wrote it.
    """
    return Results(latest(list(_read(Path(path)).values())))


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


def _read(path: Path) -> dict[str, Record]:
    """The last record of every id; one with numbers goes before a later one without."""
    file = path / FILE_NAME if path.is_dir() else path
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise ResultsError(
            f"{str(file)!r} cannot be read ({error.strerror}): give a {FILE_NAME} of `vlmprune "
            f"sweep`, or its folder."
        ) from error
    records: dict[str, Record] = {}
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            known = record["schema"]
        except (ValueError, KeyError, TypeError):
            continue
        if known > SCHEMA:
            raise ResultsError(
                f"{file}, line {number} was written by a newer vlmprune (schema {known}, this one "
                f"reads {SCHEMA}): upgrade, or choose another --output_path."
            )
        before = records.get(record["id"])
        if before is None or before["status"] != "ok" or record["status"] == "ok":
            records[record["id"]] = _up_to_date(record)
    return records


def _up_to_date(record: dict[str, Any]) -> Record:
    """A record of any older schema in the present one."""
    if "accuracy" in record:
        old = record.pop("accuracy")
        score = Score(
            value=old["value"],
            unit="share",
            n=old["n"],
            low=old["low"],
            high=old["high"],
            higher_is_better=True,
            by_kind=old["by_kind"],
            outcomes=[float(c) for c in old["outcomes"]],
            replicates=[],
        )
        record |= {"scores": {"accuracy": score}, "examples": []}
    return record  # type: ignore[return-value]
