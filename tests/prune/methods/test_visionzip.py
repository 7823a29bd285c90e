"""VisionZip: by hand, as published, and the order of tiles."""

import math
from itertools import chain

import pytest
import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from kit.merging import CANVAS, CPU, close, given_signals, make
from torch import Tensor
from torch.nn.functional import cosine_similarity
from vlmprune.prune.contract import ClsFeatures, EncoderFeatures, Method
from vlmprune.prune.ops.spread import share
from vlmprune.prune.registry import method_class
from vlmprune.prune.tiling import Block, Tiling


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
    close(entering, golden.arrays["out_features"].flatten(0, 1)[packed])


GOLDEN = {
    "visionzip": Runner(
        "visionzip",
        lambda p: {"contextual": p["contextual"] / (p["dominant"] + p["contextual"])},
        _visionzip,
    ),
}


def visionzip_rows(scores, keys, features, cls, keep, contextual):
    """The published steps for one tile, token by token: (order, features), patches from 0."""
    merged = min(round(keep * contextual), keep - 1)
    with_cls = cls is not None and keep > 1
    dominant = sorted(
        sorted(range(len(scores)), key=lambda i: -scores[i])[: keep - merged - with_cls]
    )
    rest = [i for i in range(len(scores)) if i not in dominant]
    order = [-1] * with_cls + dominant
    rows = [cls] * with_cls + [features[i] for i in dominant]
    targets = rest[:: max(1, len(rest) // merged)][:merged] if merged else []
    metric = keys.mean(1)
    assigned: dict[int, list[int]] = {target: [] for target in targets}
    for token in set(rest) - set(targets) if targets else ():
        similar = [float(cosine_similarity(metric[token], metric[t], dim=0)) for t in targets]
        assigned[targets[similar.index(max(similar))]].append(token)
    for target, others in assigned.items():
        mean = features[others].mean(0) if others else 0
        rows.append(features[target] + mean)
    return order + targets, torch.stack(rows), assigned


@pytest.mark.parametrize("scores", ["cls", "received"])
@pytest.mark.parametrize(("keep", "contextual"), [(1, 0.5), (2, 0.5), (9, 0.4), (33, 0.3), (34, 0)])
def test_visionzip_is_the_published_one(scores, keep, contextual):
    chooser = method_class("visionzip")(scores=scores, contextual=contextual)
    tokens = make(chooser, Tiling.single(5, 7))
    signals = list(tokens.signals.values())
    cls = signals[3][0] if scores == "cls" else None
    order, rows, assigned = visionzip_rows(*signals[:3], cls, keep, contextual)
    chosen = chooser.select(tokens, keep)
    assert chosen.order.tolist() == order
    entering = signals[2][chosen.order].clone()
    if chosen.features is not None:
        entering[chosen.rows] = chosen.features
    torch.testing.assert_close(entering, rows)
    first = keep - len(assigned)
    groups = [
        [first + i, token]
        for i, (target, others) in enumerate(assigned.items())
        for token in sorted([target, *others])
    ]
    assert ([] if chosen.groups is None else chosen.groups.T.tolist()) == groups


def test_visionzip_by_hand():
    """Six tokens in a row, four rows: CLS, token 4, and tokens 0 and 2 with what is like them."""
    chooser = method_class("visionzip")(contextual=0.5)
    attention = torch.tensor([0.1, 0.05, 0.02, 0.03, 0.3, 0.04])
    east, north = [1.0, 0.0], [0.0, 1.0]
    keys = torch.tensor([east, north, north, north, east, east])[:, None]
    features = torch.tensor([1.0, 10, 100, 1000, 10000, 100000])[:, None]
    cls = torch.tensor([[7.0]])
    tokens = given_signals(chooser, Tiling.single(1, 6), attention, keys, features, cls)
    chosen = chooser.select(tokens, 4)
    # the rest is 0, 1, 2, 3, 5: a step of 2 makes 0 and 2 targets; 5 is like 0, 1 and 3 like 2
    assert chosen.order.tolist() == [-1, 4, 0, 2]
    assert chosen.kept.tolist() == [0, 2, 4]
    assert chosen.rows.tolist() == [0, 2, 3]
    assert chosen.features.tolist() == [[7], [100001], [605]]
    assert chosen.groups.tolist() == [[2, 2, 3, 3, 3], [0, 5, 1, 2, 3]]
    assert not chosen.projected


@pytest.mark.parametrize(
    ("keep", "dominant", "contextual"), [(64, 54, 10), (128, 108, 20), (192, 162, 30), (32, 27, 5)]
)
def test_visionzip_splits_budgets_as_published(keep, dominant, contextual):
    chooser = method_class("visionzip")()
    chosen = chooser.select(make(chooser, Tiling.single(24, 24)), keep)
    assert len(chosen.groups[0].unique()) == contextual
    assert len(chosen.features) == contextual + 1  # and CLS, which counts as dominant
    assert keep - contextual == dominant


@pytest.mark.parametrize("keep", [20, 30, 45])
def test_visionzip_order_of_tiles(keep):
    """Thumbnail: CLS, dominant, merged. Canvas: dominant in raster order, all CLS, all merged."""
    tiling = CANVAS.without_newlines()
    chooser = method_class("visionzip")(contextual=0.3)
    tokens = make(chooser, tiling)
    scores, keys, features, cls = tokens.signals.values()
    counts = share(keep, [tile.num_patches for tile in tiling.tiles])
    parts: list[list[list]] = [[], [], []]  # CLS, dominant, merged: per tile (number, feature)
    for number, places in enumerate(tiling.tile_patches(CPU)):
        order, rows, assigned = visionzip_rows(
            scores[places], keys[places], features[places], cls[number], counts[number], 0.3
        )
        names = [places[i].item() if i >= 0 else -1 for i in order]
        listed = list(zip(names, rows.tolist(), strict=True))
        cut = len(listed) - len(assigned)
        for part, found in zip(parts, (listed[:1], listed[1:cut], listed[cut:]), strict=True):
            part.append(found)
    expected = [*parts[0][0], *parts[1][0], *parts[2][0]]
    crops = [list(chain.from_iterable(part[1:])) for part in parts]
    expected += [*sorted(crops[1]), *crops[0], *crops[2]]
    chosen = chooser.select(tokens, keep)
    assert chosen.order.tolist() == [name for name, _ in expected]
    entering = features[chosen.order].clone()
    entering[chosen.rows] = chosen.features
    torch.testing.assert_close(entering, torch.tensor([row for _, row in expected]))


def test_visionzip_keeps_small_tiles_whole():
    """Where a tile's share is its size nothing of it is merged, and no CLS is added."""
    chooser = method_class("visionzip")(contextual=0.5)
    tiling = CANVAS.without_newlines()
    chosen = chooser.select(make(chooser, tiling), tiling.num_tokens - 1)
    whole = [number for number, tile in enumerate(tiling.tiles) if tile.num_patches < 16]
    for number in whole:
        tile = tiling.tile_patches(CPU)[number].tolist()
        assert set(tile) <= set(chosen.kept.tolist())
        assert not set(tile) & set(chosen.groups[1].tolist())
