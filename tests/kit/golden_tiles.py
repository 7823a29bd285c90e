"""Golden runners of methods that weigh tiles and chunks of the image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from torch import Tensor
from vlmprune.prune.contract import Features, Method
from vlmprune.prune.tiling import Block, Tiling


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
    "hired_next": Runner("hired", lambda p: {"alpha": p["alpha"], "official": True}, _hired_next),
    "hired_llava15": Runner("hired", lambda p: {}, _hired_plain),
    "globalcom2": Runner(
        "globalcom2",
        lambda p: {
            "temperature": p["temperature"],
            "retention_ratio": p["retention_ratio"],
            "official": True,
        },
        _globalcom2,
    ),
    "holov": Runner(
        "holov",
        lambda p: {"num_chunks": p["num_patches"], "alpha": p["alpha_llava"], "official": True},
        _holov,
    ),
}
