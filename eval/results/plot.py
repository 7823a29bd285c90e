"""The accuracy-cost frontier of a sweep as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from .records import Record, main_score, method_name, variant
from .sweep_table import in_order
from .task_kinds import ANSWERS, kind_of
from .texts import metric_text, scale, setting_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKERS = "osD^vPX*<>ph"
_ASIDE = 2.5  # methods of equal cost are spread over so many points of the cost axis
_NEAR = (0.8, 0.8)  # points of both axes within which a mark hides another
_MARK = 5


def frontier(records: Sequence[Record], path: Path | IO[bytes]) -> None:
    """Write a PNG: the score over the share of dense FLOPs, a line a method."""
    draw(records).savefig(path, format="png")


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
        unit = " %" if scale(main_score(dense)[1]) == 100 else ""
        axes.axhline(
            value, color="black", linestyle="--", linewidth=1, label=f"dense {value:.1f}{unit}"
        )
    marks: list[tuple[float, float, tuple[float, float, float]]] = []
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
            markersize=_MARK,
            linewidth=1.4,
            elinewidth=0.7,
            capsize=2,
        )
        marks += [
            (x + aside, y, colors[index % len(colors)]) for x, y in zip(cost, values, strict=True)
        ]
    _rings(axes, marks)
    axes.set_xlim(left=0)
    kind = kind_of(done[0]["config"]) if done else ANSWERS
    axes.set_xlabel(f"{kind.costs[0].label} (equal costs drawn side by side; rings: hidden points)")
    axes.grid(alpha=0.25)
    if done:
        axes.set_ylabel(f"{metric_text(done[0])} (95 % interval)")
        config = done[0]["config"]
        shown = f"{main_score(done[0])[1]['n']} {kind.item}s"
        figure.suptitle(f"{config['model']} on {config['task']}, {shown}", fontsize=12)
        axes.set_title(setting_line(config), fontsize=7, color="gray")
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=9, frameon=False)
    return figure


def _rings(axes: Axes, marks: Sequence[tuple[float, float, tuple[float, float, float]]]) -> None:
    """A ring around every mark that later ones hide, wider the more they are."""
    for number, (x, y, color) in enumerate(marks):
        above = [
            later
            for later in marks[number + 1 :]
            if abs(later[0] - x) <= _NEAR[0] and abs(later[1] - y) <= _NEAR[1]
        ]
        if above:
            size = _MARK + 5 * len(above)
            axes.plot(
                [x], [y], "o", fillstyle="none", markersize=size, color=color, label="_hidden"
            )


def _point(record: Record) -> tuple[float, float, float, float]:
    """Cost in percent, score and the interval's distance below and above it (0 without one)."""
    score = main_score(record)[1]
    value, low, high = score["value"], score["low"], score["high"]
    return (
        kind_of(record["config"]).share(record),
        scale(score) * value,
        scale(score) * (value - low if low is not None else 0.0),
        scale(score) * (high - value if high is not None else 0.0),
    )
