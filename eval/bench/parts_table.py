"""Where the time of a first token goes: encoder, choice, LLM; and what decoding costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..results.statistics import Spread
from ..table import Table


def parts_table(reports: Sequence[Mapping[str, Any]]) -> Table:
    """Reports of `vlmprune bench model`, of several models or pictures: columns without any entry
    are left out. A share of the encoder is one of the whole, so that nobody takes it for another
    model's, or for that of another picture."""
    rows = [_row(report["model"], variant) for report in reports for variant in report["variants"]]
    shown = [header for header in rows[0] if any(row[header] for row in rows)]
    return Table(
        headers=tuple(shown),
        rows=[tuple(row[header] for header in shown) for row in rows],
        numbers_from=2,
        title="Parts of the first token, and decoding behind it",
        notes=" ".join(note for header, note in _NOTES.items() if header in shown),
    )


_NOTES = {
    "Variant": "In brackets, % of the first token.",
    "Encoder GFLOPs": "GFLOPs: the vision encoder (of windowed ones the most that it can be), the "
    "projector and the decoder with its head; choosing is not counted.",
    "Encoder ms": "Times are medians over rounds, ratios those of two runs of a round. Encoder: "
    "with what is chosen in it and read for a choice.",
    "Encoder/slicing [quartiles]": "Slicing: the same encoder that keeps the first rows, as many "
    "in each block, without any choice.",
    "Choice ms": "Choice: a part of the encoder's time or of the LLM's, by where the method acts.",
    "LLM ms": "LLM: projector, prefill and head.",
}


def _row(model: Mapping[str, Any], variant: Mapping[str, Any]) -> dict[str, str]:
    flops, seconds, shares = variant["flops"], variant["seconds"], variant["shares"]
    whole = variant["first_token_flops"]
    return {
        "Model": f"{model['name'].removesuffix(', random weights')}, {model['visual_tokens']} "
        f"tokens{_size(model)}",
        "Variant": variant["name"],
        "Encoder GFLOPs": _flops(flops["vision"], whole),
        "Projector GFLOPs": _flops(flops["projector"], whole),
        "LLM GFLOPs": _flops(flops["prefill"] + flops["lm_head"], whole),
        "GFLOPs/token": f"{flops['per_decoded_token'] / 1e9:.3g}",
        "Encoder ms": _ms(seconds["vision"], shares["vision"]),
        "Encoder/slicing [quartiles]": _quartiles(variant["ratios"].get("vision_over_slicing")),
        "Choice ms": _ms(seconds["select"], shares["select"]) if variant["methods"] else "",
        "LLM ms": _ms(seconds["rest"], shares["rest"]),
        "First token ms": _ms(seconds["total"]),
        "ms/token": _ms(seconds["per_decoded_token"]),
    }


def _size(model: Mapping[str, Any]) -> str:
    """The picture's, where one was asked for."""
    size = model["picture"]
    return "" if size is None else f", {size[0]} x {size[1]} pixels"


def _flops(part: int, whole: int) -> str:
    giga = part / 1e9
    return f"{giga:{'.0f' if giga >= 100 else '.3g'}} ({100 * part / whole:.1f})"


def _quartiles(ratio: Spread | None) -> str:
    return "{median:.3f} [{q1:.3f}, {q3:.3f}]".format(**ratio) if ratio is not None else ""


def _ms(value: Spread | None, share: Spread | None = None) -> str:
    if value is None:
        return ""
    percent = f" ({100 * share['median']:.1f})" if share is not None else ""
    return f"{1e3 * value['median']:.1f}{percent}"
