"""Golden runners of methods that weigh tiles and chunks of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from torch import Tensor
from torch.nn.functional import normalize
from vlmprune.prune.contract import Features, Method, Selection, VisualTokens
from vlmprune.prune.methods.before_llm.globalcom2 import GlobalCom2
from vlmprune.prune.methods.before_llm.hired import HiRED
from vlmprune.prune.methods.before_llm.holov import HoloV
from vlmprune.prune.ops.parts import by_tile, canvas_of, tile_numbers, top_of_each
from vlmprune.prune.ops.topk import ascending, top_k
from vlmprune.prune.tiling import Block, Tiling

_EPS = 1e-6  # of the official HoloV


def _span(original: tuple[int, int], canvas: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a canvas (h, w) that an image (h, w) fills, scaled to fit in it."""
    height, width = canvas
    if original[1] * height > original[0] * width:
        pad = (height - int(original[0] * (width / original[1]))) // 2
        return slice(pad, height - pad), slice(0, width)
    pad = (width - int(original[1] * (height / original[0]))) // 2
    return slice(0, height), slice(pad, width - pad)


def _merged(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """Square tiles (n, P) on one canvas (height, width) of `grid` rows and columns of them."""
    side = math.isqrt(tiles.shape[1])
    canvas = tiles.view(*grid, side, side).transpose(1, 2)
    return canvas.reshape(grid[0] * side, grid[1] * side)


# --- HiRED -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OfficialHiRED(HiRED):
    """Counts in as many equal strips of the thumbnail as there are crops; shares rounded down."""

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        if canvas_of(tokens.tiling) is None:
            return super().select(tokens, keep)
        early, late = (tokens.signals[signal] for signal in self._signals(tokens.shape))
        first, *crops = (tile.num_patches for tile in tokens.tiling.tiles)
        own = min(int(keep * self.alpha), first)
        best = torch.zeros(first).index_fill(
            0, top_k(early[:first], int(first * (1 - self.alpha))), 1
        )
        strips = best.view(len(crops), -1).sum(1)
        shares = (strips / strips.sum() * min(keep - own, sum(crops))).long()
        counts = torch.cat([torch.tensor([own]), shares.minimum(torch.tensor(crops))])
        parts = tile_numbers(tokens.tiling, late.device)
        order = top_of_each(late, parts, counts, int(counts.sum()))
        return Selection(kept=ascending(order), scores=late)


def _hired_next(golden: Golden, method: Method) -> None:
    arrays, params = golden.arrays, golden.params
    early, late = (arrays[f"cls_rows_layer{i}"].mean(1) for i in (0, 22))
    tiles, patches = late.shape
    side = math.isqrt(patches)
    grid = _hired_grid(params["image_size_hw"], params["grid_pinpoints_hw"], side)
    assert grid[0] * grid[1] == tiles - 1

    canvas = Block((side,) * grid[0], (side,) * grid[1])
    tiling = Tiling((Block((side,), (side,)), canvas))
    numbers = _as_tokens(torch.arange(tiles * patches).view(tiles, patches), grid)
    signals = {
        signal: _as_tokens(scores, grid)
        for signal, scores in zip(method.needs(CLIP_L), (early, late), strict=True)
    }
    keep = int(tiles * patches * params["token_budget_rate"])
    kept = numbers[choose(method, signals, keep, tiling=tiling).kept]
    mask = torch.zeros(tiles * patches, dtype=torch.bool).index_fill(0, kept, True)
    mask = mask.view(tiles, patches)
    assert_equal(mask, arrays["kept_mask"])
    assert_equal(mask.sum(1), arrays["kept_per_tile_counts"])

    # The official packing takes rows of tiles for columns and cuts padding away with kept tokens.
    ids = torch.arange(tiles * patches).view(tiles, patches)
    swapped = (grid[1], grid[0])
    ids_on, mask_on = (_merged(x[1:], swapped) for x in (ids, mask))
    height, width = params["image_size_hw"]
    span = _span((height, width), tuple(ids_on.shape))
    packed = torch.cat([ids[0][mask[0]], ids_on[span][mask_on[span]]])
    assert_equal(packed, arrays["kept"])


def _as_tokens(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """(T, P) thumbnail and crops -> (N,) in the order of an image's tokens."""
    return torch.cat([tiles[0], _merged(tiles[1:], grid).flatten()])


def _hired_grid(
    size: Sequence[int], pinpoints: Sequence[Sequence[int]], side: int
) -> tuple[int, int]:
    """Rows and columns of crops: of the resolution that shows most, and wastes least."""

    def merit(pinpoint: Sequence[int]) -> tuple[int, int]:
        scale = min(pinpoint[1] / size[1], pinpoint[0] / size[0])
        shown = min(int(size[1] * scale) * int(size[0] * scale), size[0] * size[1])
        return shown, shown - pinpoint[0] * pinpoint[1]

    best = max(pinpoints, key=merit)
    return best[0] // (side * 14), best[1] // (side * 14)


def _hired_plain(golden: Golden, method: Method) -> None:
    late = golden.arrays["cls_rows_layer22"].mean(0)
    keep = min(len(late), int(len(late) * golden.params["token_budget_rate"]))
    signals = dict.fromkeys(method.needs(CLIP_L), late)  # the first layer decides nothing
    assert_equal(choose(method, signals, keep).kept, golden.arrays["kept"])


# --- GlobalCom2 ------------------------------------------------------------------------------


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
    rows, columns = _span((height, width), (down * side, across * side))
    ids = torch.arange(logits.numel()).view(logits.shape)
    canvas = Block(*(_cut(side, n, s) for n, s in ((down, rows), (across, columns))))
    tiling = Tiling((Block((side,), (side,)), canvas))

    def tokens(tiles: Tensor) -> Tensor:
        return torch.cat([tiles[0], _merged(tiles[1:], (down, across))[rows, columns].flatten()])

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


# --- HoloV -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OfficialHoloV(HoloV):
    """Flat chunks, a diversity that cancels, -1 where a chunk is too small for its share."""

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        features, attention = (tokens.signals[s].float() for s in self.needs(tokens.shape))
        number = self._number(tokens.num_tokens, keep)
        chunks = attention.tensor_split(number)
        weights = torch.stack(list(map(self._weight, features.tensor_split(number), chunks)))
        weights = weights / (weights.sum() + _EPS)
        counts = (weights * keep).floor().long()
        counts[top_k(weights, keep - int(counts.sum()))] += 1

        order, start = [], 0
        for chunk, count in zip(chunks, counts.tolist(), strict=True):
            whole = count >= len(chunk)
            order.append(start + (torch.arange(len(chunk)) if whole else top_k(chunk, count)))
            start += len(chunk)
        found = torch.cat(order)
        pads = found.new_full((keep - len(found),), -1)
        return Selection(kept=ascending(found), order=torch.cat([found, pads]))

    def _weight(self, features: Tensor, attention: Tensor) -> Tensor:
        if len(attention) < 2:
            return attention.mean()
        unit = normalize(features, dim=-1, eps=_EPS)
        similar = (unit @ unit.T).fill_diagonal_(0)  # to itself, too, in the variance
        others = len(similar) - 1
        spread = (similar - similar.sum(1, keepdim=True) / others).square().sum(1) / others
        scaled = 1000 * attention
        scale = scaled.abs().mean() / (spread.abs().mean() + _EPS)
        return (scaled + self.alpha * spread * scale).mean()


def _holov(golden: Golden, method: Method) -> None:
    values = golden.arrays["features"], golden.arrays["attn"]
    signals = dict(zip(method.needs(CLIP_L), values, strict=True))
    assert isinstance(next(iter(signals)), Features)
    chosen = choose(method, signals, golden.params["new_image_token_num"])
    assert chosen.order is not None
    pad = golden.params["pad_code"]
    order = chosen.order.where(chosen.order >= 0, pad)
    assert_equal(order, golden.arrays["kept"])
    assert_equal(chosen.kept, order[order != pad].sort().values)


RUNNERS: dict[str, Runner] = {
    "hired_next": Runner("hired", lambda p: {"alpha": p["alpha"]}, _hired_next, OfficialHiRED),
    "hired_llava15": Runner("hired", lambda p: {}, _hired_plain),
    "globalcom2": Runner(
        "globalcom2",
        lambda p: {key: p[key] for key in ("temperature", "retention_ratio")},
        _globalcom2,
        OfficialGlobalCom2,
    ),
    "holov": Runner(
        "holov",
        lambda p: {"num_chunks": p["num_patches"], "alpha": p["alpha_llava"]},
        _holov,
        OfficialHoloV,
    ),
}
