"""Golden runners of methods that pick greedily."""

from __future__ import annotations

import math

import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from torch import Tensor
from vlmprune.prune.contract import ClipImage, ClipText, Features, Method
from vlmprune.prune.methods.before_llm.cdpruner import relevance
from vlmprune.prune.ops.dpp import weighted_greedy_map
from vlmprune.prune.ops.parts import by_tile
from vlmprune.prune.tiling import Block, Tiling


def _vispruner(golden: Golden, method: Method) -> None:
    features, cls_rows = golden.arrays["features"], golden.arrays["cls_rows"]
    masks = torch.zeros(features.shape[:2], dtype=torch.bool)
    for mask, row, here in zip(masks, cls_rows.mean(1), features, strict=True):
        signals = dict(zip(method.needs(CLIP_L), (row, here), strict=True))
        mask[choose(method, signals, golden.params["visual_token_num"]).kept] = True
    assert_equal(masks, golden.arrays["kept_mask"])
    ids = _ids(_tiling(golden))
    assert_equal(ids[masks.flatten()[ids]], golden.arrays["kept"])


def _cdpruner(golden: Golden, method: Method) -> None:
    features, image = golden.arrays["features"], golden.arrays["image_embeds"]
    text, count = golden.arrays["text_embeds"], golden.params["visual_token_num"]
    tiling = _tiling(golden)
    ids = _ids(tiling)
    signals = {
        Features(): features.flatten(0, 1)[ids],
        ClipImage(): image.flatten(0, 1)[ids],
        ClipText(): text,
    }
    kept = ids[choose(method, signals, count * len(features), tiling=tiling).kept]
    assert_equal(kept, golden.arrays["kept"])
    masks = torch.zeros(features.shape[:2], dtype=torch.bool)
    masks.view(-1)[kept] = True
    assert_equal(masks, golden.arrays["kept_mask"])

    weights = relevance(image.flatten(0, 1), text).view(masks.shape)
    order = weighted_greedy_map(list(features), weights, count)
    assert_equal(order, golden.arrays["select_order"])


def _tiling(golden: Golden) -> Tiling:
    """The tiles of `features` (tiles, patches, width): the first alone, the others on a canvas."""
    tiles, patches = golden.arrays["features"].shape[:2]
    side = math.isqrt(patches)
    rows, columns = (side, side) if side * side == patches else (1, patches)
    alone = Block((rows,), (columns,))
    if not golden.params["grid_wh"]:
        return Tiling((alone,) * tiles)
    width, height = golden.params["grid_wh"]
    return Tiling((alone, Block((rows,) * height, (columns,) * width)))


def _ids(tiling: Tiling) -> Tensor:
    """tile * patches + patch of every token, in the order of the LLM."""
    return by_tile(tiling, torch.device("cpu")).argsort()


RUNNERS: dict[str, Runner] = {
    "vispruner": Runner("vispruner", lambda p: {"important": p["important_ratio"]}, _vispruner),
    "cdpruner": Runner("cdpruner", lambda p: {}, _cdpruner),
}
