"""Methods on the KV cache in comparisons and tables: what is left, not "196 of 196"."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import vlmprune
from PIL import Image
from vlmprune.eval import embedded
from vlmprune.eval.commands.ask import _table
from vlmprune.eval.compare.side_by_side import LEGEND, Panel, side_by_side
from vlmprune.eval.models.picture_fit import picture_fit
from vlmprune.eval.results.records import cache_text


@pytest.fixture(scope="module")
def compared():
    model, processor = embedded.load_model()
    question = embedded.questions()[18]
    wide = question.image.resize((448, 224))
    return vlmprune.compare(
        model,
        processor,
        wide,
        question.question,
        [
            "visual_press",
            vlmprune.method("token_select", keep_ratio=0.5, n_init=1, n_local=2),
            "grid",
        ],
        keep_ratio=0.25,
        max_new_tokens=2,
        repeats=1,
    )


def test_a_comparison_says_what_is_left_in_the_cache(compared):
    dense, press, select, grid = compared.rows
    assert (press.tokens, press.cache_tokens) == (196, 49)
    assert (select.tokens, select.cache_tokens) == (196, 98)  # that a new token may attend to
    assert grid.cache_tokens is None and dense.cache_tokens is None
    column = [row[2] for row in compared.table().rows]
    assert column == ["196", "196, 49 in cache", "196, 98 in cache", "49"]


def test_the_caption_of_a_panel_says_it_too(compared, monkeypatch):
    captions = []
    monkeypatch.setattr(
        "vlmprune.eval.compare.comparison.side_by_side",
        lambda title, panels, columns: captions.extend(p.caption for p in panels),
    )
    compared.picture()
    dense, press, *_ = captions
    assert dense == "all 196 tokens"
    assert press.endswith("196 tokens, cache 49 of 196 per layer (mean)")


def test_ask_has_a_line_for_it(compared):
    dense, press, _, grid = compared.rows
    lines = {row[0]: row[1:] for row in _table("visual_press", dense, press).rows}
    assert lines["visual tokens"] == ("196", "196", "0 %")
    assert lines["visual in cache"] == ("196", "49", "75 %")
    assert "visual in cache" not in {row[0] for row in _table("grid", dense, grid).rows}


def test_tables_of_results_say_it_and_old_records_have_none(compared):
    tokens = compared.rows[1].measured["tokens"]
    assert cache_text(tokens) == ", 49 in cache"
    old = {key: value for key, value in tokens.items() if key != "cache_per_image"}
    assert cache_text(old) == ""


def test_the_picture_of_a_cache_has_a_scale_and_a_processor_that_crops_nothing_no_frame(compared):
    _, press, _, grid = compared.rows
    assert grid.picture.width / grid.picture.height == pytest.approx(2, abs=0.05)
    assert press.picture.width == grid.picture.width
    assert press.picture.height > grid.picture.height
    beside = grid.picture.crop((0, 0, 40, grid.picture.height))  # dropped tokens are grey
    greys = [n for n, (r, g, b) in beside.getcolors(maxcolors=10**6) if r == g == b]
    assert sum(greys) > beside.width * beside.height / 3


@pytest.mark.parametrize(("crops", "fit"), [(False, "stretch"), (True, None), (None, None)])
def test_the_fit_is_what_the_processor_says(crops, fit):
    images = SimpleNamespace() if crops is None else SimpleNamespace(do_center_crop=crops)
    assert picture_fit(SimpleNamespace(image_processor=images)) == fit
    assert picture_fit(SimpleNamespace()) is None


def test_only_what_is_seen_is_explained(compared):
    *_, grid = compared.rows
    assert grid.picture.info["legend"] == ["Grey: dropped.", "White lines: kept as it is."]
    assert all(sentence in LEGEND for sentence in grid.picture.info["legend"])
    assert "merged" in LEGEND and "Hatched" in LEGEND and "KV cache" in LEGEND  # of a report


def test_what_colours_mean_is_written_under_the_panels():
    panels = [Panel(Image.new("RGB", (100, 100), "white"), "caption", "text")]
    plain = side_by_side("title", panels, 1)
    panels[0].picture.info["legend"] = ["Grey: dropped."]
    said = side_by_side("title", panels, 1)
    assert said.height > plain.height
    below = said.crop((0, plain.height - 5, said.width, said.height))
    assert len(below.getcolors(maxcolors=10**6)) > 10
