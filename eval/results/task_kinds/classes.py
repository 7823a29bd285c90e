"""Pictures that a classifier names: patches, FLOPs and speed of the whole encoder."""

from __future__ import annotations

from typing import Any

from .. import records
from .kind import Column, Cost, Finished, Mean, TaskKind


def _tokens(key: str) -> Any:
    def value(record: Finished) -> float | None:
        tokens = record["tokens"]
        return None if tokens is None else float(tokens[key])

    return value


def _kept(joined: str) -> Any:
    def text(record: Finished) -> str:
        tokens = record["tokens"]
        if tokens is None:
            return ""
        return f"{tokens['kept_per_image']:.4g}{joined}{tokens['in_per_image']:.4g}"

    return text


def _text(value: Any, digits: str) -> Any:
    """A value as text, empty where there is none."""

    def text(record: Finished) -> str:
        found = value(record)
        return "" if found is None else f"{found:{digits}}"

    return text


def _median(key: str) -> Any:
    def value(record: Finished) -> float | None:
        spread = record["times"][key]
        return float(spread["median"]) if spread else None

    return value


def _share(record: Finished) -> float:
    return float(100 * record["flops"]["forward_share"])


def _gflops(record: Finished) -> float:
    return float(record["flops"]["forward"] / 1e9)


def _per_second(record: Finished) -> float | None:
    seconds = _SECONDS(record)
    return 1 / seconds if seconds else None


def _milliseconds(record: Finished) -> float | None:
    seconds = _SECONDS(record)
    return None if seconds is None else 1e3 * seconds


def _percent_of_time(record: Finished) -> float | None:
    share = _median("share_of_dense")(record)
    return None if share is None else 100 * share


def _peak(record: Finished) -> float | None:
    peak = record["peak_memory_bytes"]
    return peak / 2**20 if peak else None


def _numbers(measured: Finished) -> dict[str, Any]:
    """Patches, FLOPs of a picture, medians of times in seconds, bytes."""
    tokens = measured["tokens"] or {}
    return {
        **{f"tokens_{key}": value for key, value in tokens.items() if key != "per_layer"},
        "tokens_per_layer": list(tokens.get("per_layer", ())),
        **{f"flops_{key}": value for key, value in measured["flops"].items()},
        "seconds_picture": _SECONDS(measured),
        "seconds_dense_picture": _median("dense_picture")(measured),
        "picture_share_of_dense": _median("share_of_dense")(measured),
        "images_per_second": _per_second(measured),
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "notes": "; ".join(measured["notes"]),
    }


_A_BLOCK, _LEFT = _tokens("average_per_layer"), _tokens("kept_per_image")
_SECONDS = _median("picture")
_SPEED = Column("Images/s", _text(_per_second, ".4g"), _per_second)
_TIME = Column("Time, % of dense", _text(_percent_of_time, ".0f"), _percent_of_time)
_COUNTED = Column("GFLOPs", _text(_gflops, ".4g"), _gflops)
_PAID = Column("FLOPs share %", _text(_share, ".1f"), _share)
_MEMORY = Column("Peak MiB", _text(_peak, ".0f"), _peak)
_WHAT = (
    "Patches: those, or groups of them, behind the last block, and the mean entering a block. "
    "GFLOPs a picture: torch's counter on the first batch, multiply-add = 2; share of dense on "
    "it. Images/s: the median batch, forward passes alone; time of dense on the same batches in "
    "turn. Peak: memory of the accelerator, with weights; a CPU tells none."
)

CLASSES = TaskKind(
    name=records.CLASSES,
    item="picture",
    costs=(
        Cost("flops", "FLOPs of a picture, % of dense", 1, _share),
        Cost("gflops", "GFLOPs of a picture", 2, _gflops),
        Cost("tokens", "Patches entering a block, mean", 1, _A_BLOCK),
        Cost("time", "Time a picture, ms (median batch)", 2, _milliseconds),
    ),
    columns=(
        Column("Patches kept", _kept(" of "), _LEFT),
        Column("Patches a block", _text(_A_BLOCK, ".1f"), _A_BLOCK),
        _PAID,
        _COUNTED,
        _SPEED,
        _TIME,
        _MEMORY,
    ),
    notes=_WHAT,
    short=(
        Column("Patches", _kept("/"), _LEFT),
        Column("Avg/block", _text(_A_BLOCK, ".1f"), _A_BLOCK),
        _COUNTED,
        _PAID,
        _SPEED,
        _TIME,
        _MEMORY,
    ),
    short_notes="{} with its 95 % interval; difference to dense paired picture by picture. "
    + _WHAT,
    droppable=(10, 5, 7, 3),
    means=(
        Mean("Patches", _A_BLOCK),
        Mean(r"FLOPs \%", _share),
        Mean("GFLOPs", _gflops, digits=2),
        Mean(r"Time \%", _percent_of_time, digits=0),
    ),
    paper_notes=(
        "Patches: those that enter a block, mean.",
        r"FLOPs: of a picture, multiply-add = 2; \% of dense.",
        "Time: of a picture, of dense on the same batches in turn, median",
    ),
    numbers=_numbers,
    output_type="multiple_choice",
    parts=("tokens", "flops", "times", "peak_memory_bytes"),
)
