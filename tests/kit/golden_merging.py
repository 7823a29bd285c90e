"""Golden runners of methods that merge tokens."""

from __future__ import annotations

import math

import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from torch import Tensor
from vlmprune.prune.contract import ClsFeatures, EncoderFeatures, Method
from vlmprune.prune.tiling import Block, Tiling


def _close(ours: Tensor, golden: Tensor) -> None:
    torch.testing.assert_close(ours, golden, rtol=1e-4, atol=1e-5)


def _visionzip(golden: Golden, method: Method) -> None:
    """Tile by tile the files number CLS 0 and patches from 1; rows are numbered tile after tile."""
    rows, hidden, metric = (golden.arrays[name] for name in ("cls_rows", "hidden", "metric"))
    per_tile = golden.params["dominant"] + golden.params["contextual"]
    tiles, side = len(hidden), math.isqrt(hidden.shape[1])
    blocks = [Block((side,), (side,))]
    if golden.params["grid_wh"]:
        columns, lines = golden.params["grid_wh"]
        blocks.append(Block((side,) * lines, (side,) * columns))
    tiling = Tiling(tuple(blocks))
    token = torch.stack(tuple(tiling.tile_patches(hidden.device)))  # (tiles, patches)

    def by_token(patches: Tensor) -> Tensor:
        return patches.flatten(0, 1)[token.flatten().argsort()]

    salience, keys, *_ = method.needs(CLIP_L)
    signals = {
        salience: by_token(rows.mean(1)[:, 1:]),
        keys: by_token(metric[:, 1:, None]),
        EncoderFeatures(): by_token(hidden[:, 1:]),
        ClsFeatures(): hidden[:, 0],
    }
    chosen = choose(method, signals, tiles * per_tile, tiling=tiling)

    # Each of our rows as the file's tile and number in it, and the file's place for this row.
    assert chosen.order is not None
    packed = golden.arrays.get("packed_slot_ids", torch.arange(tiles * per_tile))
    place = token.flatten().argsort()[chosen.order]
    number = torch.where(chosen.order < 0, 0, place % side**2 + 1)
    tile = torch.where(chosen.order < 0, packed // per_tile, place // side**2)
    assert_equal(tile, packed // per_tile)
    slots = torch.cat([golden.arrays["kept"], golden.arrays["context_target_pos"]], 1)
    assert_equal(number, slots.flatten()[packed])

    entering = signals[EncoderFeatures()][chosen.order]
    assert chosen.features is not None
    assert chosen.rows is not None
    entering[chosen.rows] = chosen.features
    _close(entering, golden.arrays["out_features"].flatten(0, 1)[packed])


def _prumerge(golden: Golden, method: Method) -> None:
    query, keys = golden.arrays["q_cls"], golden.arrays["keys"]
    kept = golden.arrays["kept"]
    attention = (keys @ query / math.sqrt(len(query))).softmax(0)[1:]
    _close(attention, golden.arrays["cls_attn"])
    features = golden.arrays["features"]
    signals = dict(zip(method.needs(CLIP_L), (attention, keys[1:, None], features), strict=True))
    # A budget chooses the same number by the same rule only where no token is spaced.
    for keep in (None, len(kept) + 1) if method.name == "prumerge" else (None,):
        chosen = choose(method, signals, keep)
        assert chosen.order is not None
        assert chosen.features is not None
        assert_equal(chosen.order, torch.cat([kept, kept.new_tensor([-1])]))
        assert_equal(chosen.kept, kept.sort().values)
        _close(chosen.features, golden.arrays["out_features"])


RUNNERS: dict[str, Runner] = {
    "visionzip": Runner(
        "visionzip",
        lambda p: {"contextual": p["contextual"] / (p["dominant"] + p["contextual"])},
        _visionzip,
    ),
    "prumerge": Runner("prumerge", lambda p: {"neighbours": p["k_neighbors"]}, _prumerge),
    "prumergeplus": Runner("prumerge_plus", lambda p: {"neighbours": p["k_neighbors"]}, _prumerge),
}
