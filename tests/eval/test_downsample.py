"""The baseline whose pictures are smaller: counts that are reached, cells, refusals, resuming."""

from __future__ import annotations

import json

import pytest
import torch
import vlmprune
from kit.zoo import CASES, PROCESSORS, hooks
from PIL import Image
from vlmprune.adapters.registry import family_of
from vlmprune.eval import cli, embedded
from vlmprune.eval.in_process import sweep_model
from vlmprune.eval.models.registry import known_family
from vlmprune.eval.models.smaller import nearest_grid
from vlmprune.eval.report.repeat import _method_word
from vlmprune.eval.results.records import method_record
from vlmprune.eval.tasks.jsonl import JsonlTask
from vlmprune.eval.words.downsample import Downsample
from vlmprune.eval.words.parts import parse
from vlmprune.prune.budget import MethodCall
from vlmprune.prune.errors import (
    BudgetError,
    MethodFieldError,
    UnknownMethodError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)

pytestmark = pytest.mark.usefixtures("timed_once")


@pytest.fixture(scope="module")
def model_and_processor():
    return embedded.load_model()


def asked(tmp_path, *sizes: tuple[int, int]) -> JsonlTask:
    lines = []
    for number, size in enumerate(sizes):
        Image.radial_gradient("L").convert("RGB").resize(size).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "question": "what ?", "answer": "x"}))
    (tmp_path / "my.jsonl").write_text("\n".join(lines))
    return JsonlTask(tmp_path / "my.jsonl", max_new_tokens=2)


# --- A tower of one square picture -----------------------------------------------------------


def test_squares_are_reached_and_shown(model_and_processor, tmp_path):
    model, processor = model_and_processor
    sweep_model(model, processor, [], [], limit=1)  # transformers installs its own hooks once
    before = hooks(model)
    given = {"limit": 3, "output_path": tmp_path}
    found = sweep_model(model, processor, ["downsample"], [1.0, 0.5, 49, 22, "avg:49"], **given)
    dense, full, half, *rest = found
    assert [r["tokens"]["kept_per_image"] for r in found] == [196, 196, 100, 49, 25, 49]
    assert {r["tokens"]["in_per_image"] for r in found} == {196}
    assert full["answers"] == dense["answers"] and full["flops"] == dense["flops"]
    assert half["flops"]["vision"] < dense["flops"]["vision"]  # fewer patches in the encoder too
    assert half["flops"]["visual_share"] == pytest.approx(100 / 196, rel=0.1)
    assert half["kv_bytes"] < dense["kv_bytes"] and half["times"]["share_of_dense"] is not None
    assert half["notes"] == ["98 tokens are no square: 10 x 10 = 100 is the nearest."]
    assert rest[0]["notes"] == [] and "where" not in half
    assert len({r["id"] for r in found}) == len(found)
    assert hooks(model) == before and processor.image_processor.size["height"] == 112


def test_a_later_sweep_goes_on(model_and_processor, tmp_path):
    model, processor = model_and_processor
    given = {"limit": 2, "output_path": tmp_path}
    sweep_model(model, processor, ["downsample"], [49], **given)
    lines = (tmp_path / "runs.jsonl").read_text()
    sweep_model(model, processor, ["downsample"], [49], **given)
    assert (tmp_path / "runs.jsonl").read_text() == lines


def test_positions_are_interpolated_for_small_pictures_alone(model_and_processor):
    model, processor = model_and_processor
    seen = known_family("llava").smaller(model.config, processor, lambda tokens: 49)
    tower = family_of(model).vision_tower
    small, whole = torch.rand(1, 3, 56, 56), torch.rand(1, 3, 112, 112)
    plain = tower(whole).last_hidden_state
    with seen.on(tower):
        assert tower(small).last_hidden_state.shape[1] == 50
        assert torch.equal(tower(whole).last_hidden_state, plain)
    with pytest.raises(ValueError, match="56"):
        tower(small)


def test_it_is_compared_too(model_and_processor):
    picture = Image.new("RGB", (60, 40))
    found = vlmprune.compare(*model_and_processor, picture, "what ?", "downsample", keep_tokens=49)
    assert [row.tokens for row in found.rows] == [196, 49]
    assert found.picture()


# --- Pictures of any size --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_pictures_of_any_size_are_resized(name, tmp_path):
    case, processor = CASES[name], PROCESSORS[name].processor()
    processor.chat_template = (
        "<|vision_start|> " + PROCESSORS[name].MARKS["image_token"] + " <|vision_end|> what"
    )
    unit = processor.image_processor.patch_size * processor.image_processor.merge_size
    processor.image_processor.size["shortest_edge"] = 4 * unit**2
    processor.image_processor.size["longest_edge"] = 100 * unit**2
    task = asked(tmp_path, (6 * unit, 4 * unit), (8 * unit, 8 * unit))
    found = sweep_model(case.model(), processor, ["downsample"], [1.0, 0.25, 1], task=task)
    assert [r["status"] for r in found] == ["ok"] * 4, found[1].get("error")
    dense, full, quarter, least = found
    assert dense["tokens"]["in_per_image"] == full["tokens"]["kept_per_image"] == (24 + 64) / 2
    assert quarter["tokens"]["in_per_image"] == (24 + 64) / 2
    assert quarter["tokens"]["kept_per_image"] == (6 + 16) / 2  # 2 x 3 and 4 x 4
    assert least["tokens"]["kept_per_image"] == 4  # the processor scales nothing below that
    assert quarter["flops"]["vision"] < dense["flops"]["vision"]


@pytest.mark.parametrize(
    ("shape", "wanted", "least", "grid"),
    [(1, 98, 1, (10, 10)), (2 / 3, 6, 1, (2, 3)), (1, 23, 1, (5, 5)), (50, 2, 1, (2, 1)),
     (0.9, 5, 5, (2, 3))],
)  # fmt: skip
def test_grids_keep_proportions(shape, wanted, least, grid):
    assert nearest_grid(shape, wanted, least) == grid


# --- What is refused -------------------------------------------------------------------------


def test_no_model_is_patched_with_it(model_and_processor):
    model, _ = model_and_processor
    with pytest.raises(UnknownMethodError, match="sweep --methods downsample"):
        vlmprune.patch(model, "downsample", keep_ratio=0.5)
    (part,) = parse("downsample@0.5")
    with pytest.raises(UnsupportedFeatureError, match="resize the pictures"):
        vlmprune.patch(model, MethodCall(part.method, part.budget))
    assert "downsample" not in vlmprune.methods()


def test_it_is_no_part_of_a_combination():
    with pytest.raises(MethodFieldError, match="alone"):
        parse("downsample@0.5+fastv")
    with pytest.raises(MethodFieldError, match="no fields"):
        parse("downsample:layer=3@0.5")
    with pytest.raises(BudgetError, match="no schedule"):
        parse("downsample@published")


def test_commands_that_patch_refuse_it(capsys):
    assert cli.main(["bench", "select", "--methods", "downsample"]) == 2
    assert "no method" in capsys.readouterr().err


def test_tiles_are_not_applicable(tmp_path):
    model = CASES["llava_next"].model()
    with pytest.raises(UnsupportedModelError, match="llava_next"):
        known_family("llava_next").smaller(model.config, None, lambda tokens: 1)


def test_its_words_come_back():
    (part,) = parse("downsample@0.25")
    assert isinstance(part.method, Downsample)
    record = method_record(part)
    assert record == {
        "name": "downsample",
        "fields": {},
        "budget": {"word": "keep_ratio", "value": 0.25},
    }
    assert _method_word(record, 0) == "downsample@0.25"
