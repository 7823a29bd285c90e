"""GlobalCom2: against its published rule, regions, counts, layers."""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose, load
from kit.paths import TESTS
from kit.tiles import CPU, given_signals, make_tokens, merged, shape_of, span_of
from kit.tilings import THUMBNAIL, TILINGS
from torch import Tensor
from torch.nn.functional import interpolate
from vlmprune.prune.contract import ClsLogits, Method, ReceivedAttention, Selection, VisualTokens
from vlmprune.prune.methods.before_llm.globalcom2 import GlobalCom2
from vlmprune.prune.ops.parts import by_tile, canvas_of, tile_numbers
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Block, Tiling


@dataclass(frozen=True, kw_only=True)
class OfficialGlobalCom2(GlobalCom2):
    """Equal parts of the thumbnail, counts rounded down from a ratio (None: keep / tokens), and a
    token's number among its crop's tokens taken for its place on the crop with padding."""

    retention_ratio: float | None = None

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        chosen, tiling = super().select(tokens, keep), tokens.tiling
        if canvas_of(tiling) is None:
            return chosen
        first = tiling.tiles[0].num_patches
        own = int((chosen.order < first).sum())
        crops = chosen.order[own:]
        crops = crops[_misplaced(tiling)[crops - first].argsort(stable=True)]
        return replace(chosen, order=torch.cat([chosen.order[:own], crops]))

    def _counts(
        self, base: Tensor, canvas: Block, tokens: VisualTokens, keep: int
    ) -> tuple[int, Tensor, int]:
        ratio = self.retention_ratio
        ratio = keep / tokens.num_tokens if ratio is None else ratio
        equal = Block((1,) * len(canvas.row_sizes), (1,) * len(canvas.column_sizes))
        sizes = torch.tensor([crop.num_patches for crop in tokens.tiling.tiles[1:]])
        counts = (self._scales(base, equal, ratio) * sizes).long()
        return int(base.numel() * ratio), counts, int(counts.sum())


def _misplaced(tiling: Tiling) -> Tensor:
    """Where the official packing puts each token of the canvas: (P,)."""
    (thumbnail, *crops), places = tiling.tiles, []
    width = thumbnail.columns * len(tiling.blocks[1].column_sizes)
    for crop in crops:
        number = torch.arange(crop.num_patches)
        row = crop.place[0] * thumbnail.rows + number // thumbnail.columns
        column = crop.place[1] * thumbnail.columns + number % thumbnail.columns
        places.append(row * width + column)
    return torch.cat(places)[by_tile(tiling, number.device)[thumbnail.num_patches :].argsort()]


def _globalcom2(golden: Golden, method: Method) -> None:
    logits, params = golden.arrays["cls_logits"], golden.params
    (width, height), (across, down) = params["image_size_wh"], params["grid_wh"]
    patches = logits.shape[1]
    side = math.isqrt(patches)
    rows, columns = span_of((height, width), (down * side, across * side))
    ids = torch.arange(logits.numel()).view(logits.shape)
    canvas = Block(*(_cut(side, n, s) for n, s in ((down, rows), (across, columns))))
    tiling = Tiling((Block((side,), (side,)), canvas))

    def tokens(tiles: Tensor) -> Tensor:
        return torch.cat([tiles[0], merged(tiles[1:], (down, across))[rows, columns].flatten()])

    (signal,) = method.needs(CLIP_L)
    keep = max(1, int(tiling.num_tokens * params["retention_ratio"]))
    chosen = choose(method, {signal: tokens(logits)}, keep, tiling=tiling)
    assert chosen.order is not None
    emitted = tokens(ids)[chosen.order]
    own = len(golden.arrays["kept_thumbnail"])
    assert_equal(emitted[:own], golden.arrays["kept_thumbnail"])

    # A newline after each row of the whole canvas, with the tokens where the official code puts
    # them: at their number among the tokens of their crop.
    lines: list[list[int]] = [[] for _ in range(down * side)]
    places = tiling.tile_patches(torch.device("cpu"))[1:]
    for tile, inside in zip(tiling.tiles[1:], places, strict=True):
        for number, name in enumerate(tokens(ids)[inside].tolist()):
            if name in set(emitted[own:].tolist()):
                lines[tile.place[0] * side + number // side].append(name)
    newline = params["newline_code"]
    place = {name: i for i, name in enumerate(emitted.tolist())}
    packed = [x for line in lines for x in (*sorted(line, key=place.__getitem__), newline)]
    assert [x for x in packed if x != newline] == emitted[own:].tolist()
    assert_equal(torch.tensor(packed), golden.arrays["kept_crops_packed"])
    assert_equal(torch.cat([emitted[:own], torch.tensor(packed)]), golden.arrays["kept"])


def _cut(side: int, tiles: int, span: slice) -> tuple[int, ...]:
    """What is left of `tiles` of length `side` in a row, cut to `span`."""
    edges = [min(max(i * side, span.start), span.stop) for i in range(tiles + 1)]
    return tuple(b - a for a, b in pairwise(edges))


GOLDEN = {
    "globalcom2": Runner(
        "globalcom2",
        lambda p: {key: p[key] for key in ("temperature", "retention_ratio")},
        _globalcom2,
        OfficialGlobalCom2,
    ),
}


def published_globalcom2(logits, side: int, grid: tuple[int, int], keep: int, temperature: float):
    """The rule read literally for crops without padding: emission order of thumbnail and crops."""
    down, across = grid
    base, canvas = logits[: side * side].view(side, side), logits[side * side :].double()
    ratio = keep / len(logits)
    height, width = side // down, side // across
    sums = [
        base[i * height : (i + 1) * height, j * width : (j + 1) * width].double().sum().item()
        for i in range(down)
        for j in range(across)
    ]
    weights = [math.exp((s - max(sums)) / temperature) for s in sums]
    weights = [w / (sum(weights) + 1e-8) for w in weights]
    mean = sum(weights) / len(weights)
    scales = [min(1.0, ratio * (1 + w - mean)) for w in weights]
    own = round(side * side * ratio)
    quotas = [(keep - own) * scale / sum(scales) for scale in scales]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: keep - own - sum(counts)]:
        counts[i] += 1
    size = (down * side, across * side)
    wide = interpolate(base[None, None].double(), size, mode="bilinear")[0, 0]
    chosen = []
    for k, count in enumerate(counts):
        top, left = k // across * side, k % across * side
        region = [(top + y) * size[1] + left + x for y in range(side) for x in range(side)]
        local = canvas[region] / canvas[region].norm()
        shown = wide.flatten()[region] / wide.flatten()[region].norm()
        ranked = sorted(zip((local + shown).tolist(), region, strict=True), reverse=True)
        chosen += [side * side + place for _, place in ranked[:count]]
    return logits[: side * side].argsort(descending=True)[:own].tolist() + sorted(chosen)


@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("temperature", [10.0, 1.0])
def test_globalcom2_is_the_published_rule(grid, temperature):
    tiling = Tiling((Block((6,), (6,)), Block((6,) * grid[0], (6,) * grid[1])))
    method = method_class("globalcom2")(temperature=temperature)
    tokens = make_tokens(method, tiling, seed=3)
    (logits,) = tokens.signals.values()
    for keep in (1, 17, 31, 60):
        expected = published_globalcom2(logits, 6, grid, keep, temperature)
        chosen = method.select(tokens, keep)
        assert chosen.order.tolist() == expected
        assert chosen.kept.tolist() == sorted(expected)


@pytest.mark.parametrize("name", ["672x672_r0.25", "w300h900_r0.5"])
def test_globalcom2_scales_are_the_official_ones(name):
    """Also those of the default, where the crops have no padding or are padded alike."""
    golden = load(TESTS / "golden" / f"globalcom2__{name}.npz")
    (across, down), ratio = golden.params["grid_wh"], golden.params["retention_ratio"]
    base = golden.arrays["cls_logits"][0].view(24, 24)
    scales = method_class("globalcom2")()._scales(base, Block((24,) * down, (24,) * across), ratio)
    torch.testing.assert_close(scales, golden.arrays["scales"], rtol=1e-12, atol=0)


def test_globalcom2_regions_without_padding():
    """Constant scores: every crop keeps the same share, however much of its padding is gone."""
    method = method_class("globalcom2")(temperature=0.1)
    tiling = Tiling((THUMBNAIL, Block((2, 6, 2), (4,))))
    tokens = make_tokens(method, tiling, constant=True)
    kept = method.select(tokens, 28).kept
    counts = tile_numbers(tiling, CPU)[kept].bincount().tolist()
    assert counts == [8, 4, 12, 4]


def test_globalcom2_keeps_no_more_than_a_crop():
    """All weight on one crop: without the bound it would have 1.5 times its size in the sharing."""
    base = torch.zeros(4, 4)
    base[:2, :2] = 1000
    scales = method_class("globalcom2")()._scales(base, Block((1, 1), (1, 1)), 0.8)
    torch.testing.assert_close(scales, torch.tensor([1, 0.6, 0.6, 0.6]).double())


def test_globalcom2_layers():
    needs = [
        method_class("globalcom2")(**fields).needs(shape_of(tower))
        for fields, tower in [
            ({}, "clip"),
            ({"layer": -2}, "clip"),
            ({"scores": "received"}, "windowed"),
        ]
    ]
    assert needs == [(ClsLogits(23),), (ClsLogits(22),), (ReceivedAttention(31),)]


def test_globalcom2_without_crops_is_a_thumbnail():
    method = method_class("globalcom2")()
    chosen = method.select(given_signals(method, Tiling.single(1, 5), [3, -1, 5, 0, 4]), 3)
    assert chosen.order.tolist() == [2, 4, 0]
    frames = Tiling((Block((1,), (3,)), Block((1,), (3,))))
    chosen = method.select(given_signals(method, frames, [1, 2, 3, 3, 2, 1]), 3)
    assert chosen.order.tolist() == [2, 1, 3]


def test_globalcom2_keeps_newlines_in_the_count():
    method, tiling = method_class("globalcom2")(), TILINGS["2 x 2 with newlines"]
    chosen = select(method, make_tokens(method, tiling), 30)
    assert set(tiling.newlines(CPU).tolist()) <= set(chosen.kept.tolist())
    assert chosen.count == 30


def test_globalcom2_official_ratio():
    """Counts rounded down from the ratio, whatever the count; without one, from keep / tokens."""
    tiling = TILINGS["2 x 2"]
    given_ratio, derived = OfficialGlobalCom2(retention_ratio=0.25), OfficialGlobalCom2()
    tokens = make_tokens(derived, tiling)
    assert torch.equal(given_ratio.select(tokens, 3).order, derived.select(tokens, 20).order)
