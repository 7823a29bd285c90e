"""The bench of methods in the vision encoder: beside slicing, and parts by model and picture."""

from __future__ import annotations

import json

import pytest
import torch
import vlmprune
from kit.zoo import CASES, hooks
from vlmprune.eval import cli
from vlmprune.eval.bench.bench_table import bench_table
from vlmprune.eval.bench.parts_table import parts_table
from vlmprune.eval.bench.slicing import sliced, slicing
from vlmprune.eval.bench.targets import targets, verdicts
from vlmprune.prune.answers.answer import looks_at_values

TINY = ["--layers", "4", "--width", "128", "--tokens", "16", "--repeats", "2", "--new_tokens", "2"]
SMALL_PICTURES = ["--shape", "qwen2.5-vl-7b", "--meta", "--methods", "tome", "--budgets", "0.25"]


def bench(path, *argv: str) -> dict | list:
    assert cli.main(["bench", "model", *argv, "-o", str(path)]) == 0
    return json.loads(path.read_text())


def calls(name: str, **budget) -> list:
    return [vlmprune.method(name, **budget)]


@torch.inference_mode()
@pytest.mark.parametrize("case", ["llava-clip-llama", "llava_next", "qwen2_5_vl", "qwen3_vl"])
@pytest.mark.parametrize("name", ["tome", "evit", "expedit"])
def test_slicing_leaves_as_many_rows_in_each_block_and_chooses_nothing(case: str, name: str):
    case = CASES[case]
    model, inputs = case.model(), case.inputs([(4, "B", 6)])
    model(**inputs)  # transformers puts hooks of its own on
    before = hooks(model)
    try:
        with vlmprune.patch(model, calls(name, keep_ratio=0.5)) as handle:
            model(**inputs)
            rows = handle.last.encoder
    except (vlmprune.UnsupportedModelError, vlmprune.UnsupportedFeatureError):
        assert name == "expedit" and case.packed
        return
    call = slicing(calls(name, keep_ratio=0.5))
    assert not looks_at_values(call.method, debug=False)
    with vlmprune.patch(model, [call]) as handle:
        model(**inputs)
        assert handle.last.encoder == rows
        first = handle.last.kept[0][: handle.last.tokens_kept[0]]
        assert first.tolist() == sorted(first.tolist())
    with sliced(model, calls(name, keep_ratio=0.5)) as is_sliced:
        assert is_sliced
        model.base_model.get_image_features(**{k: inputs[k] for k in encoder_keys(inputs)})
    with sliced(model, calls("grid", keep_ratio=0.5)) as is_sliced:
        assert not is_sliced
    assert hooks(model) == before


def encoder_keys(inputs) -> list[str]:
    return [k for k in inputs if k in ("pixel_values", "image_grid_thw", "image_sizes")]


def test_restoring_slicing_gives_all_rows_back():
    call = slicing(calls("expedit", keep_tokens=4))
    before, after = torch.randn(2, 9, 3), torch.randn(2, 4, 3)
    restored = call.method.restore(before, after, None)
    assert torch.equal(restored[:, :4], after) and torch.equal(restored[:, 4:], before[:, 4:])


def test_methods_in_the_encoder_stand_beside_slicing(tmp_path, capsys):
    argv = ["--methods", "tome", "tome@0.5+random@0.25", "grid", "--budgets", "0.5"]
    report = bench(tmp_path / "bench.json", *TINY, *argv)
    dense, tome, both, grid = report["variants"]
    assert [v["place"] for v in (tome, both)] == ["in the vision encoder", "before the LLM"]
    assert tome["kept"] == 8 and both["kept"] == 4
    for variant in (tome, both):
        assert variant["ratios"]["vision_over_slicing"]["n"] == 2
        assert variant["ratios"]["vision_over_plain"] is None
        assert variant["flops"]["vision"] < grid["flops"]["vision"] < dense["flops"]["vision"]
        assert variant["flops"]["projector"] < dense["flops"]["projector"]
        promised = {target.ratio for target in verdicts(report["model"], variant)}
        assert promised == {"total_over_oracle", "decode_over_oracle", "vision_over_slicing"}
    assert "vision_over_slicing" not in grid["ratios"]
    for variant in report["variants"]:
        parts, whole = variant["flops"], variant["first_token_flops"]
        assert whole == sum(n for name, n in parts.items() if name != "per_decoded_token")
        shares = variant["shares"]
        assert shares["vision"]["median"] + shares["rest"]["median"] == pytest.approx(1, abs=0.05)
        assert (shares["select"] is None) == (not variant["methods"])
    out = capsys.readouterr().out
    assert "Encoder/slicing" in out and "Parts of the first token" in out


def test_what_is_promised_in_the_encoder():
    model = {"visual_tokens": 576, "ragged": False}
    found = targets(model, "in the vision encoder", in_encoder=True)
    assert [(t.ratio, t.limit) for t in found] == [
        ("total_over_oracle", 1.05),
        ("decode_over_oracle", 1.02),
        ("vision_over_slicing", 1.05),
    ]


def test_several_pictures_show_that_shares_are_not_one_number(tmp_path, capsys):
    file = tmp_path / "bench.json"
    reports = bench(file, *SMALL_PICTURES, "--picture", "280x280", "1120x1120")
    assert [report["model"]["picture"] for report in reports] == [[280, 280], [1120, 1120]]
    shares = [
        [v["flops"]["vision"] / v["first_token_flops"] for v in report["variants"]]
        for report in reports
    ]
    (small, small_tome), (large, large_tome) = shares
    assert 0.1 < small < large < 0.5 and small_tome > small and large_tome > large
    table = parts_table(reports)
    assert [row[0] for row in table.rows[::2]] == [
        "qwen2.5-vl-7b, 100 tokens, 280 x 280 pixels",
        "qwen2.5-vl-7b, 1600 tokens, 1120 x 1120 pixels",
    ]
    assert "Encoder ms" not in table.headers and "Encoder GFLOPs" in table.headers
    assert "Parts of the first token" in capsys.readouterr().out


def test_several_models_in_one_run(tmp_path):
    argv = ["--meta", "--methods", "evit", "--budgets", "0.25"]
    shapes = ["--shape", "llava-1.5-7b", "qwen3-vl-8b"]
    reports = bench(tmp_path / "bench.json", *argv, *shapes)
    assert [report["model"]["name"].split(",")[0] for report in reports] == shapes[1:]
    for report in reports:
        assert bench_table(report).rows
        dense, evit = report["variants"]
        assert evit["first_token_flops"] < dense["first_token_flops"]


def test_a_picture_that_one_of_the_models_does_not_take_is_refused_first(tmp_path, capsys):
    argv = ["--shape", "qwen3-vl-8b", "llava-1.5-7b", "--picture", "1024x1024", "--meta"]
    assert cli.main(["bench", "model", *argv, "-o", str(tmp_path / "bench.json")]) == 2
    captured = capsys.readouterr()
    assert "336x336 only" in captured.err and not captured.out
    assert not (tmp_path / "bench.json").exists()
