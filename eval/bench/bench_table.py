"""Reports of `vlmprune bench model` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..environment import describe
from ..models.shapes import TEXT_TOKENS
from ..results.statistics import Spread
from ..table import Table
from .targets import Target, verdicts


def bench_table(report: Mapping[str, Any]) -> Table:
    """The report of one run, as written to the result file; columns without any entry are left
    out."""
    rows = [_row(report["model"], variant) for variant in report["variants"]]
    shown = [header for header in _HEADERS if any(row[header] for row in rows)]
    return Table(
        headers=tuple(shown),
        rows=[tuple(row[header] for header in shown) for row in rows],
        numbers_from=1,
        droppable=tuple(shown.index(header) for header in _DROPPABLE if header in shown),
        title=_title(report),
        notes=" ".join(note for header, note in _NOTES.items() if header in shown),
    )


def _title(report: Mapping[str, Any]) -> str:
    model = report["model"]
    what = f"{model['name']}: {_sizes(model)}, {model['dtype']}, {model['attn_implementation']}"
    if not report["measured"]:
        return f"{what}; NOT RUN, reckoned from sizes"
    return (
        f"{what}; {report['rounds']} rounds of {report['new_tokens']} new tokens on "
        f"{describe(report['hardware'])}"
    )


def before_after_table(before: Mapping[str, Any] | None, after: Mapping[str, Any]) -> Table:
    """How close each method is to its oracle, in an earlier version and in a later one.

    Args:
        before: the same variants; None where no earlier version was measured.
    """
    earlier = {variant["name"]: variant for variant in (before or {"variants": []})["variants"]}
    dense = after["variants"][0]
    rows = []
    for variant in after["variants"][1:]:
        was = earlier.get(variant["name"])
        rows.append(
            (
                variant["name"],
                _times(variant["ratios"]["speed_up"]),
                *(_change(was, variant, ratio, form) for ratio, form in _COMPARED.values()),
                _verdict_text(verdicts(after["model"], variant)),
            )
        )
    return Table(
        headers=("Method", "Speed-up", *_COMPARED, "Promises"),
        rows=rows,
        numbers_from=1,
        title=f"{_title(after)}; dense {_ms_range(dense['seconds']['total'])} ms, "
        f"{_ms_range(dense['seconds']['per_decoded_token'], 1)} ms a token",
        notes="Medians of the ratios of two runs of the same round"
        + (", before -> after. " if before else ". ")
        + f"{_NOTES['Total/oracle [quartiles]']} {_NOTES['Vision/plain']} "
        f"{_NOTES['Choice % of dense prefill']} {_NOTES['Promises']}",
    )


def _ratio(value: Spread | None) -> str:
    return f"{value['median']:.3f}" if value else ""


def _percent(value: Spread | None) -> str:
    return f"{100 * value['median']:.2f}" if value else ""


_COMPARED = {
    "First token/oracle": ("total_over_oracle", _ratio),
    "Decoding/oracle": ("decode_over_oracle", _ratio),
    "Vision/plain": ("vision_over_plain", _ratio),
    "Choice % of dense prefill": ("select_over_dense_prefill", _percent),
}


def _change(was: Mapping[str, Any] | None, now: Mapping[str, Any], ratio: str, form: Any) -> str:
    later = form(now["ratios"][ratio])
    if was is None or not was["ratios"][ratio]:
        return str(later)
    return f"{form(was['ratios'][ratio])} -> {later}"


def _verdict_text(found: Mapping[Target, str]) -> str:
    """What is not met, in short."""
    lacking = [f"{target.what} {verdict}" for target, verdict in found.items() if verdict != "met"]
    return "; ".join(lacking) or ("met" if found else "")


def _sizes(model: Mapping[str, Any]) -> str:
    size = f"{model['parameter_bytes'] / 2**30:.1f} GiB"
    parts = [
        f"{model['parameters'] / 1e9:.2f} B parameters ({size})",
        f"{model['layers']} layers",
        f"width {model['width']}",
        f"{model['visual_tokens']} visual + {model['text_tokens']} text tokens",
    ]
    if model["batch_size"] > 1:
        ragged = " of unequal length" if model["ragged"] else ""
        parts.append(f"batch of {model['batch_size']}{ragged}")
    return ", ".join(parts)


def shapes_table(reports: Sequence[dict[str, Any]], method: str) -> Table:
    """What one method leaves of several models, from reports that were reckoned."""
    rows = []
    for report in reports:
        model = report["model"]
        for variant in report["variants"]:
            names = [part["name"] for part in variant["methods"]]
            if names in ([], [method]):
                cells = _row(model, variant)
                dense = not names
                rows.append(
                    (
                        model["name"].removesuffix(", random weights") if dense else "",
                        f"{model['parameters'] / 1e9:.2f} B" if dense else "",
                        *(cells[header] for header in ("Variant", *_RECKONED)),
                    )
                )
    return Table(
        headers=("Model", "Parameters", "Variant", *_RECKONED),
        rows=rows,
        numbers_from=3,
        notes=f"One picture and {TEXT_TOKENS} words, {reports[0]['model']['dtype']}. GFLOPs: up to "
        f"the first token, vision included. {_NOTES['Share %']} {_NOTES['Cache MiB']}",
    )


_HEADERS = (
    "Variant",
    "Avg/layer",
    "GFLOPs",
    "Share %",
    "Vision ms",
    "Vision/plain",
    "Encoder/slicing [quartiles]",
    "Choice ms",
    "Choice % of dense prefill",
    "Total ms [quartiles]",
    "Speed-up",
    "Oracle ms",
    "Total/oracle [quartiles]",
    "in the LLM",
    "ms/token [quartiles]",
    "Speed-up of decoding",
    "Decoding/oracle [quartiles]",
    "Cache MiB",
    "Peak MiB",
    "Energy J",
    "J/token",
    "Promises",
)
_RECKONED = ("Avg/layer", "GFLOPs", "Share %", "Cache MiB")
_DROPPABLE = (
    "GFLOPs",
    "Avg/layer",
    "Vision ms",
    "Speed-up of decoding",
    "Choice ms",
    "Oracle ms",
    "in the LLM",
    "Vision/plain",
)
_NOTES = {
    "Variant": "Medians over rounds; ratios are taken within a round.",
    "Avg/layer": "Avg/layer: visual tokens that enter a decoder layer (<=: the most that an "
    "adaptive rule may keep).",
    "Share %": "Share: of the dense decoder FLOPs, visual tokens only.",
    "Vision/plain": "Vision/plain: the encoder, reading scores included, beside that of the "
    "unpatched model.",
    "Encoder/slicing [quartiles]": "Encoder/slicing: an encoder in which rows leave, choosing "
    "included, beside the same encoder that keeps the first rows, as many in each block.",
    "Choice % of dense prefill": "Choice: in the decoder and on the cache with reading scores.",
    "Total ms [quartiles]": "Total: one forward up to the first token's logits.",
    "Total/oracle [quartiles]": "Oracle: the unpatched language model on as many tokens as are "
    "kept, after the full vision encoder.",
    "ms/token [quartiles]": "ms/token: of the tokens decoded after that, by the median step; the "
    "oracle's cache has as many entries in each layer, and its steps take turns with the patched "
    "model's.",
    "Cache MiB": "Cache: keys and values after prefill.",
    "Peak MiB": "Peak: what prefill and decoding add to the loaded model.",
    "Energy J": "Energy: of the accelerator up to the first token, and of each token after it.",
    "Promises": "Promises: first token at most 1.03 of the oracle's before the LLM (1.05 in ragged "
    "batches), 1.10 in decoder and cache; decoding 1.02; vision 1.02; choosing 1 % (above 1024 "
    "tokens 2 %); inside the vision encoder 1.05 of slicing, and first token 1.05. open: the lower "
    "quartile is within, the median is not.",
}


def _row(model: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, str]:
    """The cells of one line by their headers."""
    seconds, ratios, joules = variant["seconds"], variant["ratios"], variant["joules"]
    average = f"{variant['average_per_layer']:.1f}"
    return {
        "Variant": variant["name"],
        "Avg/layer": f"<= {average}" if variant["at_most"] else average,
        "GFLOPs": f"{variant['first_token_flops'] / 1e9:.4g}",
        "Share %": "" if seconds["total"] else f"{100 * variant['visual_share']:.1f}",
        "Vision ms": _ms(seconds["vision"]),
        "Vision/plain": _ratio(ratios["vision_over_plain"]),
        "Encoder/slicing [quartiles]": _range(ratios.get("vision_over_slicing")),
        "Choice ms": _ms(seconds["select"]) if variant["methods"] else "",
        "Choice % of dense prefill": _percent(ratios["select_over_dense_prefill"]),
        "Total ms [quartiles]": _ms_range(seconds["total"]),
        "Speed-up": _times(ratios["speed_up"]),
        "Oracle ms": _ms_range(seconds["oracle_total"]),
        "Total/oracle [quartiles]": _range(ratios["total_over_oracle"]),
        "in the LLM": _ratio(ratios["rest_over_oracle"]),
        "ms/token [quartiles]": _ms_range(seconds["per_decoded_token"], digits=1),
        "Speed-up of decoding": _times(ratios["decode_speed_up"]),
        "Decoding/oracle [quartiles]": _range(ratios["decode_over_oracle"]),
        "Cache MiB": _mib(variant["cache_bytes"]),
        "Peak MiB": _mib(variant["peak_memory_bytes"]),
        "Energy J": _joules(joules["first_token"]),
        "J/token": _joules(joules["per_decoded_token"]),
        "Promises": _verdict_text(verdicts(model, variant)),
    }


def _ms(value: Spread | None) -> str:
    return f"{1e3 * value['median']:.1f}" if value else ""


def _ms_range(value: Spread | None, digits: int = 0) -> str:
    if not value:
        return ""
    median, q1, q3 = (f"{1e3 * value[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{q1}, {q3}]"


def _range(value: Spread | None) -> str:
    if not value:
        return ""
    return f"{value['median']:.3f} [{value['q1']:.3f}, {value['q3']:.3f}]"


def _times(value: Spread | None) -> str:
    return f"{value['median']:.2f}x" if value else ""


def _joules(value: Spread | None) -> str:
    return f"{value['median']:.3g}" if value else ""


def _mib(size: int | None) -> str:
    return f"{size / 2**20:.1f}" if size is not None else ""
