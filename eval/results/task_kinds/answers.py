"""Questions that a vision-language model answers: tokens, FLOPs and cache of its decoder."""

from __future__ import annotations

from typing import Any

from .. import records
from ..records import Tokens, cache_text
from ..texts import milliseconds
from .kind import Column, Cost, Finished, Mean, TaskKind

_SPREADS = (
    "first_token",
    "vision",
    "select",
    "prefill",
    "per_decoded_token",
    "dense_first_token",
)


def _median(name: str, by: float = 1.0) -> Any:
    def value(record: Finished) -> float | None:
        spread = record["times"][name]
        return by * spread["median"] if spread else None

    return value


def _of_image(joined: str) -> Any:
    def text(record: Finished) -> str:
        tokens = record["tokens"]
        kept = f"{tokens['kept_per_image']:.4g}{joined}{tokens['in_per_image']:.4g}"
        return kept + cache_text(tokens)

    return text


def _left(record: Finished) -> float:
    tokens = record["tokens"]
    return float(tokens.get("cache_per_image", tokens["kept_per_image"]))


def _a_layer(record: Finished) -> float:
    return float(record["tokens"]["average_per_layer"])


def _both_averages(record: Finished) -> str:
    """Both conventions of average tokens, the second one where it says something else."""
    tokens: Tokens = record["tokens"]
    entering = f"{tokens['average_per_layer']:.1f}"
    behind = f"{tokens.get('average_after_cuts', tokens['average_per_layer']):.1f}"
    return entering if behind == entering else f"{entering} ({behind})"


def _share(record: Finished) -> float:
    return float(100 * record["flops"]["visual_share"])


def _prefill(record: Finished) -> float:
    return float(record["flops"]["prefill"])


def _share_of_time(record: Finished) -> str:
    share = _percent_of_time(record)
    return "" if share is None else f"{share:.0f}"


def _first_token(record: Finished) -> str:
    first = milliseconds(record["times"]["first_token"])
    share = _share_of_time(record)
    return f"{first} ({share} %)" if share else first


def _per_token(record: Finished) -> str:
    return milliseconds(record["times"]["per_decoded_token"])


def _cache(record: Finished) -> float:
    return float(record["kv_bytes"])


def _cache_text(record: Finished) -> str:
    return f"{record['kv_bytes'] / 1024:.0f}"


def _peak(record: Finished) -> str:
    peak = record["peak_memory_bytes"]
    return f"{peak / 2**20:.0f}" if peak else ""


def _numbers(measured: Finished) -> dict[str, Any]:
    """Tokens, FLOPs, medians of times in seconds, bytes."""
    tokens = {k: v for k, v in measured["tokens"].items() if k != "per_layer"}
    times = measured["times"]
    share = times.get("share_of_dense")
    return {
        **{f"tokens_{key}": value for key, value in tokens.items()},
        "tokens_per_layer": list(measured["tokens"]["per_layer"]),
        **{f"flops_{key}": value for key, value in measured["flops"].items()},
        **{f"seconds_{key}": s["median"] if (s := times.get(key)) else None for key in _SPREADS},
        "first_token_share_of_dense": share["median"] if share else None,
        "kv_bytes": measured["kv_bytes"],
        "peak_memory_bytes": measured["peak_memory_bytes"],
        "rotary_positions": measured["positions"] or "",
        "notes": "; ".join(measured["notes"]),
    }


_percent_of_time = _median("share_of_dense", 100)
_FIRST, _STEP = _median("first_token"), _median("per_decoded_token")

ANSWERS = TaskKind(
    name=records.ANSWERS,
    item="question",
    costs=(
        Cost("flops", "Decoder FLOPs over visual tokens, % of dense", 1, _share),
        Cost("tokens", "Visual tokens entering a decoder layer, mean", 1, _a_layer),
        Cost("kv", "KV cache after the prompt, KiB", 0, lambda r: _cache(r) / 1024),
        Cost("time", "Time to first token, ms (median at batch 1)", 1, _median("first_token", 1e3)),
    ),
    columns=(
        Column("Tokens kept", _of_image(" of "), _left),
        Column("Tokens a layer", lambda r: f"{_a_layer(r):.1f}", _a_layer),
        Column("FLOPs share %", lambda r: f"{_share(r):.1f}", _share),
        Column("Prefill GFLOPs", lambda r: f"{_prefill(r) / 1e9:.3g}", _prefill),
        Column("First token ms", lambda r: milliseconds(r["times"]["first_token"]), _FIRST),
        Column("% of dense", _share_of_time, _percent_of_time),
        Column("ms a decoded token", _per_token, _STEP),
        Column("KV KiB", _cache_text, _cache),
        Column("Peak MiB", _peak, lambda r: r["peak_memory_bytes"]),
    ),
    notes="Tokens kept: of those an image has; tokens a layer: mean entering a decoder layer. "
    "FLOPs share: decoder, visual tokens only; prefill: with text, multiply-add = 2. Times: "
    "medians at batch 1; % of dense on the same questions in turn.",
    short=(
        Column("Tokens", _of_image("/"), _left),
        Column("Avg/layer", _both_averages, _a_layer),
        Column("Prefill GFLOPs", lambda r: f"{_prefill(r) / 1e9:.3g}", _prefill),
        Column("Share %", lambda r: f"{_share(r):.1f}", _share),
        Column("First token ms", _first_token, _FIRST),
        Column("ms/token", _per_token, _STEP),
        Column("KV KiB", _cache_text, _cache),
    ),
    short_notes="{} with its 95 % interval; difference to dense paired question by question. "
    "Tokens: visual tokens kept of those an image has, and the mean entering a decoder layer (in "
    "brackets: left behind it, as SparseVLM counts, where that differs). Prefill: decoder FLOPs "
    "with text (multiply-add = 2). Share: of the dense decoder FLOPs, visual tokens only. Times: "
    "medians at batch 1; (%) of dense on the same questions in turn.",
    droppable=(9, 6, 5, 3, 8),
    means=(
        Mean("Tokens", _a_layer),
        Mean(r"FLOPs \%", _share),
        Mean(r"Time \%", _percent_of_time, digits=0),
    ),
    paper_notes=(
        "Tokens: visual tokens that enter a decoder layer, mean.",
        "FLOPs: decoder, visual tokens only, of dense.",
        "Time: to the first token, of dense on the same questions in turn, median at batch 1",
    ),
    numbers=_numbers,
    output_type="generate_until",
    parts=("tokens", "flops", "times", "kv_bytes", "peak_memory_bytes"),
)
