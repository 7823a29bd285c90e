"""The accuracy-cost frontier of a sweep as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .results import Record, method_name, variant
from .table import in_order, setting_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*<>ph"
_ASIDE = 2.5  # methods of equal cost are spread over so many points of the cost axis


def frontier(records: Sequence[Record], path: Path) -> None:
    """Write a PNG: accuracy over the share of dense FLOPs, a line a method."""
    draw(records).savefig(path)


def draw(records: Sequence[Record]) -> Figure:
    """The picture as a figure; only finished records are drawn."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: nothing global, no display

    done = [r for r in in_order(records) if r["status"] == "ok"]
    dense = next((r for r in done if method_name(r) == "dense"), None)
    methods = list(dict.fromkeys(variant(r) for r in done if method_name(r) != "dense"))
    colors = matplotlib.color_sequences["tab10" if len(methods) <= 10 else "tab20"]

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    if dense is not None:
        _, value, below, above = _point(dense)
        axes.axhspan(value - below, value + above, color="black", alpha=0.06, linewidth=0)
        axes.axhline(
            value, color="black", linestyle="--", linewidth=1, label=f"dense {value:.1f} %"
        )
    for index, method in enumerate(methods):
        points = [_point(r) for r in done if variant(r) == method]
        cost, values, lower, upper = (list(column) for column in zip(*points, strict=True))
        aside = _ASIDE * ((index + 0.5) / len(methods) - 0.5)
        axes.errorbar(
            [x + aside for x in cost],
            values,
            yerr=[lower, upper],
            label=method,
            color=colors[index % len(colors)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            linewidth=1.4,
            elinewidth=0.7,
            capsize=2,
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("prefill FLOPs over visual tokens, % of dense (equal costs drawn side by side)")
    axes.set_ylabel("accuracy, % (95 % interval)")
    axes.grid(alpha=0.25)
    if done:
        config = done[0]["config"]
        questions = done[0]["accuracy"]["n"]
        figure.suptitle(
            f"{config['model']} on {config['task']}, {questions} questions", fontsize=12
        )
        axes.set_title(setting_line(config), fontsize=7, color="gray")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    return figure


def _point(record: Record) -> tuple[float, float, float, float]:
    """Cost, accuracy and the interval's distance below and above it, in percent."""
    accuracy = record["accuracy"]
    return (
        100 * record["flops"]["visual_share"],
        100 * accuracy["value"],
        100 * (accuracy["value"] - accuracy["low"]),
        100 * (accuracy["high"] - accuracy["value"]),
    )
