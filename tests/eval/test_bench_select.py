"""`vlmprune bench select`: the transcriptions are the authors' algorithms, and the command runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from kit.golden import Golden, assert_equal, load
from kit.paths import TESTS
from torch import Tensor
from vlmprune.eval import cli
from vlmprune.eval.bench import select as bench_select
from vlmprune.eval.bench.select import Scene
from vlmprune.eval.bench.select_table import select_table
from vlmprune.eval.commands.bench_select import all_before_llm
from vlmprune.eval.transcriptions import (
    cdpruner,
    divprune,
    find,
    globalcom2,
    hiprune,
    hired,
    holov,
    prumerge,
    prumerge_plus,
    visionzip,
    vispruner,
    vtc_cls,
)
from vlmprune.eval.transcriptions.picture import in_order
from vlmprune.prune.contract import BeforeLLM
from vlmprune.prune.registry import method_class

FOLDER = TESTS / "golden"

# --- The transcriptions against the authors' results -----------------------------------------


def _divprune(golden: Golden) -> Tensor:
    order = golden.arrays["select_order"]
    picks = divprune.max_min(golden.arrays["features"], len(order))
    low, high = golden.params.get("duplicate_group", (0, 0))
    golden.arrays["kept"][(low <= golden.arrays["kept"]) & (golden.arrays["kept"] < high)] = low
    assert_equal(_canonical(picks, low, high), _canonical(order, low, high))
    return _canonical(picks.sort().values, low, high)


def _canonical(indices: Tensor, low: int, high: int) -> Tensor:
    """Any member of the duplicates stands for all of them."""
    return indices.where((indices < low) | (indices >= high), low)


def _hiprune_tiles(golden: Golden) -> Tensor:
    vectors = [hiprune.received(golden.arrays[name]) for name in ("attn_object", "attn_deep")]
    budget, alpha = golden.params["per_tile_budget"], golden.params["alpha"]
    masks = [
        hiprune.anchors_and_registers(*v, 24, budget, alpha) for v in zip(*vectors, strict=True)
    ]
    return in_order(torch.stack(masks), _grid(golden))


def _hiprune_merged(golden: Golden) -> Tensor:
    params = golden.params
    mask = hiprune.anchors_and_registers(
        golden.arrays["shallow_colsum"],
        golden.arrays["deep_colsum"],
        params["grid_w"],
        params["budget"],
        params["alpha"],
    )
    return mask.nonzero()[:, 0]


def _vtc_cls(golden: Golden) -> Tensor:
    maps = golden.arrays["cls_rows"][:, None, :, None]
    rows = vtc_cls.summed_rows(maps[golden.params["start_layer"] : -1])
    return vtc_cls.largest(rows[0], golden.params["token_num"])


def _hired_tiles(golden: Golden) -> Tensor:
    first, late = (golden.arrays[f"cls_rows_layer{i}"].sum(1) for i in (0, 22))
    rate, alpha = golden.params["token_budget_rate"], golden.params["alpha"]
    mask = hired.tiled(first, late, rate, alpha)
    assert_equal(mask, golden.arrays["kept_mask"])
    height, width = golden.params["image_size_hw"]
    crops = golden.params["tiles"] - 1
    grid = (2, 2) if crops == 4 else (crops, 1) if height > width else (1, crops)
    return hired.packed(mask, grid, (height, width))


def _hired_single(golden: Golden) -> Tensor:
    scores = golden.arrays["cls_rows_layer22"].sum(0)
    return hired.single(scores, golden.params["token_budget_rate"])


def _globalcom2(golden: Golden) -> Tensor:
    logits = golden.arrays["cls_logits"]
    width, height = golden.params["image_size_wh"]
    ratio = golden.params["retention_ratio"]
    scales = torch.tensor(globalcom2.crop_scales(logits[0], _grid(golden), ratio))
    torch.testing.assert_close(scales.double(), golden.arrays["scales"], rtol=1e-6, atol=0)
    codes = torch.arange(logits.numel()).view(*logits.shape, 1).float()
    newline = torch.tensor([float(golden.params["newline_code"])])
    rows = globalcom2.compressed(logits, codes, newline, ratio, _grid(golden), (height, width))
    return rows[:, 0].long()


def _holov(golden: Golden) -> Tensor:
    chunks, keep = golden.params["num_patches"], golden.params["new_image_token_num"]
    alpha = golden.params["alpha_llava"]
    return holov.spread(golden.arrays["features"], golden.arrays["attn"], chunks, keep, alpha)


def _visionzip(golden: Golden) -> Tensor:
    scores = visionzip.cls_sum(golden.arrays["cls_rows"][:, :, None])
    counts = golden.params["dominant"], golden.params["contextual"]
    hidden, metric = golden.arrays["hidden"], golden.arrays["metric"]
    kept, rows, _ = visionzip.zipped(scores, metric, hidden, *counts)
    _assert_rows(rows, golden)
    return kept


def _prumerge(golden: Golden) -> Tensor:
    kept = prumerge.outliers(_one_head_row(golden))
    _assert_rows(_merged(golden, kept), golden)
    return kept


def _prumerge_plus(golden: Golden) -> Tensor:
    kept = prumerge_plus.adaptive(_one_head_row(golden))
    _assert_rows(_merged(golden, kept), golden)
    return kept


def _one_head_row(golden: Golden) -> Tensor:
    return prumerge.one_head_map(golden.arrays["q_cls"][None], golden.arrays["keys"])[0, 1:]


def _merged(golden: Golden, kept: Tensor) -> Tensor:
    keys = golden.arrays["keys"][1:]
    return prumerge.merged(golden.arrays["features"], keys, _one_head_row(golden), kept)


def _vispruner(golden: Golden) -> Tensor:
    attention = golden.arrays["cls_rows"].mean(1)
    keep, ratio = golden.params["visual_token_num"], golden.params["important_ratio"]
    mask = vispruner.important_and_diverse(golden.arrays["features"], attention, keep, ratio)
    return in_order(mask, _grid(golden))


def _cdpruner(golden: Golden) -> Tensor:
    inputs = (golden.arrays[name] for name in ("features", "image_embeds", "text_embeds"))
    picks = cdpruner.greedy_map(cdpruner.kernel(*inputs), golden.params["visual_token_num"])
    assert_equal(picks, golden.arrays["select_order"])
    mask = torch.zeros_like(golden.arrays["kept_mask"]).scatter(1, picks, True)
    return in_order(mask, _grid(golden))


def _grid(golden: Golden) -> tuple[int, int]:
    width, height = golden.params["grid_wh"] or (0, 0)
    return height, width


def _assert_rows(rows: Tensor, golden: Golden) -> None:
    torch.testing.assert_close(rows, golden.arrays["out_features"], rtol=1e-4, atol=1e-5)


TRANSCRIBED: dict[str, Callable[[Golden], Tensor]] = {
    "divprune": _divprune,
    "hiprune_llava": _hiprune_tiles,
    "hiprune_qwen": _hiprune_merged,
    "vtccls": _vtc_cls,
    "hired_next": _hired_tiles,
    "hired_llava15": _hired_single,
    "globalcom2": _globalcom2,
    "holov": _holov,
    "visionzip": _visionzip,
    "prumerge": _prumerge,
    "prumergeplus": _prumerge_plus,
    "vispruner": _vispruner,
    "cdpruner": _cdpruner,
}
FILES = [path for key in TRANSCRIBED for path in sorted(FOLDER.glob(f"{key}__*.npz"))]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_transcription_gives_the_official_selection(path):
    golden = load(path)
    kept = TRANSCRIBED[path.name.partition("__")[0]](golden)
    assert_equal(kept, golden.arrays["kept"])


def test_every_transcription_of_released_code_is_compared():
    files = {path.stem for path in Path(divprune.__file__).parent.glob("*.py")}
    unreleased = {"cls_topk", "fopru", "todre", "catp"}
    keys = {key.partition("_")[0] for key in TRANSCRIBED}
    for name in files - {"__init__", "picture"} - unreleased:
        assert name.replace("_", "") in keys or name in keys, name


# --- Both sides on the command's own inputs --------------------------------------------------

SAME_BUDGETS = ("divprune", "hiprune", "vtc_cls", "cls_topk", "fopru", "cdpruner", "todre", "catp")
"""Methods whose defaults are the transcribed ones and whose counts per tile are the same."""


ONE_BY_ONE = ("divprune", "catp")
"""Whose transcriptions look at all tokens again for every pick: fewer say as much."""


@pytest.fixture(scope="module")
def scenes() -> dict[int, Scene]:
    """Of encoders with a few heads, which choose as those with all of them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(bench_select, "_HEADS", 2)
        return {
            tiles: Scene.random(tiles=tiles, images=2 if tiles == 1 else 1, width=256)
            for tiles in (1, 3, 5)
        }


@pytest.mark.parametrize("tiles", [1, 5])
@pytest.mark.parametrize("name", SAME_BUDGETS)
@torch.inference_mode()
def test_both_sides_choose_the_same(scenes, name, tiles, monkeypatch):
    if name in ONE_BY_ONE:
        monkeypatch.setattr(Scene, "keep", property(lambda scene: 32 * scene.tiles))
    scene, method, plain = scenes[tiles], method_class(name)(), find(name, tiles=tiles)
    signals = scene.signals(method)
    ids = torch.arange(scene.tokens).view(tiles, -1, 1)
    raster = bench_select._in_order(ids, scene.pictures[0].grid)[:, 0]
    chosen = bench_select.choose(scene, method, signals)
    for picture, kept in zip(scene.pictures, (one.kept for one in chosen), strict=True):
        scores = plain.read(picture, *(picture.attention(layer) for layer in plain.maps))
        theirs = plain.choose(picture, scores, scene.keep)
        if name in ("divprune", "todre", "catp"):  # their numbers are those of the sequence
            assert_equal(kept, theirs)
        else:
            assert_equal(raster[kept], theirs)


# --- The command -----------------------------------------------------------------------------


def test_bench_select_writes_both_sides(tmp_path, capsys, monkeypatch):
    path = tmp_path / "select.json"
    monkeypatch.setattr(bench_select, "_HEADS", 2)
    argv = ["--tokens", "576,1728", "--batch", "1,2", "--rounds", "1", "--width", "64"]
    before = torch.get_num_threads()
    argv += ["--threads", "1", "-o", str(path), "--methods", "divprune", "random", "hiprune"]
    assert cli.main(["bench", "select", *argv]) == 0
    assert torch.get_num_threads() == before
    report = json.loads(path.read_text())
    assert report["schema"] == 1 and report["versions"]["torch"]
    assert report["hardware"]["torch_threads"] == 1
    assert len(report["rows"]) == 12
    for row in report["rows"]:
        assert row["kept"] == (192 if row["tokens"] == 576 else 384)
        ours, plain = row["seconds"]["ours"], row["seconds"]["plain"]
        assert ours["total"]["median"] > 0 and ours["total"]["n"] == 1
        assert (plain is None) == (row["method"] == "random") == (row["plain_over_ours"] is None)
        if plain is not None:
            ratio = plain["total"]["median"] / ours["total"]["median"]
            assert row["plain_over_ours"]["median"] == pytest.approx(ratio)
            without = ratio - plain["maps"]["median"] / ours["total"]["median"]
            assert row["plain_over_ours_without_maps"]["median"] == pytest.approx(without)
    out = capsys.readouterr().out
    assert out.count("| divprune |") == 4 and "| random | 576 | 1 | 192 |" in out
    assert select_table(report).markdown().strip() == out.strip()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--tokens", "577"], "576, 1728, 2304, 2880"),
        (["--tokens", "1152"], "2880"),
        (["--tokens", "some"], "whole number"),
        (["--methods", "fastv"], "bench model"),
        (["--methods", "divprun"], "Did you mean: divprune"),
        (["--rounds", "0"], "at least 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_is_one_line(capsys, argv, says):
    try:
        code = cli.main(["bench", "select", *argv])
    except SystemExit as stop:  # argparse's way out
        code = stop.code
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert code == 2 and captured.out == "" and says in line


def test_all_methods_before_the_llm_are_the_default():
    names = all_before_llm()
    assert {"divprune", "grid"} <= set(names) and "fastv" not in names
    assert all(issubclass(method_class(name), BeforeLLM) for name in names)


@pytest.mark.parametrize("name", all_before_llm())
@torch.inference_mode()
def test_every_method_runs_on_the_commands_inputs(scenes, name):
    """With as many rows as asked, and a transcription that runs as well, where there is one."""
    scene = scenes[3]
    method, plain = method_class(name)(), find(name, tiles=3)
    assert {one.count for one in bench_select.choose(scene, method, scene.signals(method))} == {384}
    assert plain or name in ("grid", "pool", "random", "mustdrop", "scope", "vscan")
    if plain:
        picture = scene.pictures[0]
        scores = plain.read(picture, *(picture.attention(layer) for layer in plain.maps))
        assert 350 < len(plain.choose(picture, scores, 384)) < 450


def test_what_has_no_transcription():
    assert find("grid", tiles=1) is None and find("picture", tiles=1) is None
    assert find("globalcom2", tiles=1) is None and find("globalcom2", tiles=5) is not None
