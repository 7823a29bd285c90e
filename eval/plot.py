"""The accuracy-cost frontier of a sweep as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .results import Record, method_name, variant
from .table import in_order, setting_line

_MARKERS = "osD^vPX*<>ph"


def frontier(records: Sequence[Record], path: Path) -> None:
    """Draw accuracy over the share of dense FLOPs, a line a method; finished records only."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib.figure import Figure

    done = [r for r in in_order(records) if r["status"] == "ok"]
    dense = [r for r in done if method_name(r) == "dense"]
    methods = list(dict.fromkeys(variant(r) for r in done if method_name(r) != "dense"))
    colors = matplotlib.colormaps["tab10" if len(methods) <= 10 else "tab20"].colors

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for record in dense:
        accuracy = record["accuracy"]
        axes.axhline(100 * accuracy["value"], color="black", linestyle="--", linewidth=1, zorder=1)
        axes.axhspan(100 * accuracy["low"], 100 * accuracy["high"], color="black", alpha=0.06)
        axes.annotate(
            f"dense {100 * accuracy['value']:.1f} %",
            (1, 100 * accuracy["value"]),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3),
            textcoords="offset points",
            ha="right",
            fontsize=9,
        )
    for index, method in enumerate(methods):
        points = [r for r in done if variant(r) == method]
        values = [100 * r["accuracy"]["value"] for r in points]
        below = [v - 100 * r["accuracy"]["low"] for v, r in zip(values, points, strict=True)]
        above = [100 * r["accuracy"]["high"] - v for v, r in zip(values, points, strict=True)]
        axes.errorbar(
            [100 * r["flops"]["visual_share"] for r in points],
            values,
            yerr=[below, above],
            label=method,
            color=colors[index % len(colors)],
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=5,
            linewidth=1.5,
            elinewidth=0.8,
            capsize=2,
        )
    axes.set_xlabel("share of the dense model's prefill FLOPs, visual tokens (%)")
    axes.set_ylabel("accuracy (%), 95 % interval")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.25)
    if methods:
        axes.legend(loc="lower right", fontsize=9, framealpha=0.9)
    if done:
        config = done[0]["config"]
        n = done[0]["accuracy"]["n"]
        axes.set_title(f"{config['model']} on {config['task']}, {n} questions", fontsize=11)
        figure.text(0.005, 0.002, setting_line(config), fontsize=6, color="gray")
    figure.savefig(path)
