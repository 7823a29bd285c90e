"""The frontier picture: every method, the dense line, error bars, and odd inputs."""

from __future__ import annotations

import pytest
import vlmprune
from kit.sweeps import Runner, cells, go
from PIL import Image
from vlmprune.eval.results.plot import draw, frontier
from vlmprune.eval.results.store import Store


@pytest.fixture
def records(tmp_path):
    run = Runner(vtc_cls=vlmprune.MissingSignalError("no CLS"))
    go(cells("grid", "fastv", "vtc_cls"), run, tmp_path)
    return Store(tmp_path).read()


def test_every_finished_method_and_the_dense_model_are_drawn(records):
    (axes,) = draw(records).axes
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["dense 75.0 %", "grid", "fastv"]
    assert "%" in axes.get_xlabel() and "Accuracy %" in axes.get_ylabel()
    bars = [c for c in axes.containers if c.has_yerr]
    assert len(bars) == 2
    x, y = bars[0].lines[0].get_data()
    assert list(y) == [75, 75]
    assert list(x) == pytest.approx([50, 25], abs=1)
    assert x[0] != bars[1].lines[0].get_data()[0][0]  # equal cost: side by side
    low, high = bars[0].lines[2][0].get_segments()[0][:, 1]
    assert (round(low, 1), round(high, 1)) == (30.1, 95.4)


def test_a_point_that_another_hides_has_a_ring(tmp_path):
    go(cells("grid", "fastv", "random", "pool"), Runner(), tmp_path)  # all score the same
    (axes,) = draw(Store(tmp_path).read()).axes
    rings = [line for line in axes.lines if line.get_fillstyle() == "none"]
    assert len(rings) == 6  # two budgets: all but the last are behind another
    colors = {bar.lines[0].get_color() for bar in axes.containers[:3]}
    assert {ring.get_color() for ring in rings} == colors
    _, labels = axes.get_legend_handles_labels()
    assert len(labels) == 5


def test_the_png_is_readable(records, tmp_path):
    frontier(records, tmp_path / "frontier.png")
    with Image.open(tmp_path / "frontier.png") as picture:
        assert picture.format == "PNG" and picture.width >= 1000
        assert len(picture.convert("RGB").getcolors(2**24)) > 20


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_or_only_dense_draws_without_an_error(records, tmp_path, count):
    frontier(records[:count], tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").stat().st_size > 1000
