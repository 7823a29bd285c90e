"""How each kind of golden file is run: key -> (method name, fields from the file, function).

A file `<key>__<case>.npz` holds inputs and the results of the authors' own code; the function
builds the method's inputs from it, runs the method and compares. Only the files' own sizes and
settings are used, so that other cases of the same keys run as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from kit import (
    golden_cache,
    golden_corematching,
    golden_greedy,
    golden_merging,
    golden_schedules,
    golden_sparsevlm,
    golden_tiles,
)
from kit.golden import CLIP_L, LLAMA_7B, MERGING, Golden, Runner, assert_equal, choose, load
from torch import Tensor
from vlmprune.prune.batches import ranked
from vlmprune.prune.contract import (
    ClsAttention,
    Features,
    Method,
    ModelShape,
    Selection,
    TextAttention,
    Tower,
)
from vlmprune.prune.methods.before_llm.hiprune import HiPrune
from vlmprune.prune.ops.maxmin import greedy_max_min
from vlmprune.prune.ops.topk import top_k
from vlmprune.prune.tiling import Tiling


def run(path: Path) -> None:
    """Compare one golden file. A key without a runner is an error, not a skip."""
    key = path.name.partition("__")[0]
    if key not in RUNNERS:
        raise LookupError(f"{path.name}: no runner for key {key!r}; known: {', '.join(RUNNERS)}")
    runner, golden = RUNNERS[key], load(path)
    runner.compare(golden, runner.made(golden))


# --- One function a key ----------------------------------------------------------------------


def _divprune(golden: Golden, method: Method) -> None:
    features, order = golden.arrays["features"], golden.arrays["select_order"]
    low, high = golden.params.get("duplicate_group", (0, 0))

    def canonical(indices: Tensor) -> Tensor:
        """Any member of the duplicates stands for all of them."""
        return indices.where((indices < low) | (indices >= high), low)

    kept = choose(method, {Features(): features}, len(order)).kept
    assert_equal(canonical(kept), canonical(golden.arrays["kept"]))
    assert_equal(canonical(greedy_max_min([features], len(order))[0]), canonical(order))


def _hiprune_tiles(golden: Golden, method: Method) -> None:
    objects, deep = (golden.arrays[name] for name in ("attn_object", "attn_deep"))
    kept_mask = golden.arrays["kept_mask"]
    budget = golden.params["per_tile_budget"]
    masks = []
    for tile in range(len(objects)):
        received = [a[tile].mean(0).sum(0)[1:] for a in (objects, deep)]
        signals = dict(zip(method.needs(CLIP_L), received, strict=True))
        kept = choose(method, signals, budget).kept
        masks.append(torch.zeros(len(received[0]), dtype=torch.bool).index_fill(0, kept, True))
    masks = torch.stack(masks)
    assert_equal(masks, kept_mask)

    ids = torch.arange(masks.numel()).view(masks.shape)
    packed = [ids[0][masks[0]]]
    if golden.params["grid_wh"]:  # the tiles merged into one canvas, read row by row
        width, height = golden.params["grid_wh"]
        side = math.isqrt(masks.shape[1])
        canvas_ids, canvas_masks = (
            x[1:].view(height, width, side, side).transpose(1, 2).flatten() for x in (ids, masks)
        )
        packed.append(canvas_ids[canvas_masks])
    assert_equal(torch.cat(packed), golden.arrays["kept"])


@dataclass(frozen=True, kw_only=True)
class OfficialHiPrune(HiPrune):
    """On encoders that merge patches registers may repeat tokens that are certain already."""

    def _filled(self, certain: Tensor, deep: Tensor, keep: int) -> list[Selection]:
        kept = []
        for sure, scores in zip(certain, deep, strict=True):
            registers = top_k(scores - sure.float(), keep - int(sure.sum()))
            kept.append(sure.index_fill(0, registers, True).nonzero()[:, 0])
        return list(map(ranked, kept, deep))


def _hiprune_merged(golden: Golden, method: Method) -> None:
    received = (golden.arrays["shallow_colsum"], golden.arrays["deep_colsum"])
    signals = dict(zip(method.needs(MERGING), received, strict=True))
    tiling = Tiling.single(golden.params["grid_h"], golden.params["grid_w"])
    chosen = choose(method, signals, golden.params["budget"], shape=MERGING, tiling=tiling)
    assert_equal(chosen.kept, golden.arrays["kept"])


def _vtc_cls(golden: Golden, method: Method) -> None:
    rows = golden.arrays["cls_rows"]
    tower = Tower(num_layers=golden.params["layers"], has_cls=True)
    shape = ModelShape(tower=tower, decoder=LLAMA_7B)
    signals = {ClsAttention(i): row.mean(0)[1:] for i, row in enumerate(rows)}
    chosen = choose(method, signals, golden.params["token_num"], shape=shape)
    assert_equal(chosen.kept, golden.arrays["kept"])


def _fastv(golden: Golden, method: Method) -> None:
    row, params = golden.arrays["attn_last_row"], golden.params
    start, length = params["image_token_start_index"], params["image_token_length"]
    signal = TextAttention(params["fastv_k"] - 1)
    row_of_image = row.mean(0)[start : start + length]
    kept = choose(method, {signal: row_of_image}, params["keep"]).kept
    assert_equal(kept, golden.arrays["kept"])
    text = (torch.arange(start), torch.arange(start + length, row.shape[1]))
    assert_equal(torch.cat([text[0], kept + start, text[1]]), golden.arrays["kept_all"])


RUNNERS: dict[str, Runner] = {
    "divprune": Runner("divprune", lambda p: {}, _divprune),
    "hiprune_llava": Runner(
        "hiprune",
        lambda p: {"alpha": p["alpha"], "object_layer": p["object_layer"] - 1},
        _hiprune_tiles,
    ),
    "hiprune_qwen": Runner(
        "hiprune",
        lambda p: {"alpha": p["alpha"], "object_layer": p["object_layer"] - 1},
        _hiprune_merged,
        OfficialHiPrune,
    ),
    "vtccls": Runner("vtc_cls", lambda p: {"layer": p["start_layer"]}, _vtc_cls),
    "fastv": Runner("fastv", lambda p: {"layer": p["fastv_k"]}, _fastv),
    **golden_tiles.RUNNERS,
    **golden_merging.RUNNERS,
    **golden_greedy.RUNNERS,
    **golden_schedules.RUNNERS,
    **golden_sparsevlm.RUNNERS,
    **golden_corematching.RUNNERS,
    **golden_cache.RUNNERS,
}
