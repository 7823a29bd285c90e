"""HiRED: budgets of tiles by hand, its layers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from kit.tiles import CPU, given_signals, merged, shape_of, span_of
from kit.tilings import TILINGS
from torch import Tensor
from vlmprune.prune.contract import Method, Selection, VisualTokens
from vlmprune.prune.methods.before_llm.hired import HiRED
from vlmprune.prune.ops.parts import canvas_of, tile_numbers, top_of_each
from vlmprune.prune.ops.topk import ascending, top_k
from vlmprune.prune.registry import method_class
from vlmprune.prune.tiling import Block, Tiling


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
    ids_on, mask_on = (merged(x[1:], swapped) for x in (ids, mask))
    height, width = params["image_size_hw"]
    span = span_of((height, width), tuple(ids_on.shape))
    packed = torch.cat([ids[0][mask[0]], ids_on[span][mask_on[span]]])
    assert_equal(packed, arrays["kept"])


def _as_tokens(tiles: Tensor, grid: tuple[int, int]) -> Tensor:
    """(T, P) thumbnail and crops -> (N,) in the order of an image's tokens."""
    return torch.cat([tiles[0], merged(tiles[1:], grid).flatten()])


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


GOLDEN = {
    "hired_next": Runner("hired", lambda p: {"alpha": p["alpha"]}, _hired_next, OfficialHiRED),
    "hired_llava15": Runner("hired", lambda p: {}, _hired_plain),
}


def test_hired_by_hand():
    """Of 8, the thumbnail gets 4; the crops share by where its best half of tokens is."""
    method = method_class("hired")()
    tiling = TILINGS["2 x 2"]
    early, late = torch.zeros(16 + 64), torch.arange(80.0)
    early[[3, 7, 11, 15, 2, 6, 10]] = 1
    early[12] = 0.5  # one in the lower left quadrant
    chosen = method.select(given_signals(method, tiling, early, late), 8)
    # right: 4 + 3 marks, left: 0 + 1; quotas 0, 2, 0.5, 1.5, and the first of equal remainders
    tiles = tile_numbers(tiling, CPU)[chosen.kept].tolist()
    assert [tiles.count(tile) for tile in range(5)] == [4, 0, 2, 1, 1]
    assert chosen.kept.tolist() == [12, 13, 14, 15, 46, 47, 75, 79]
    assert chosen.order is None


def test_hired_official_counts_strips():
    """Marks in the right half lie in all four strips alike."""
    tiling = TILINGS["2 x 2"]
    early, late = torch.zeros(80), torch.arange(80.0)
    early[[2, 3, 6, 7, 10, 11, 14, 15]] = 1
    counts = {}
    for official, cls in ((False, method_class("hired")), (True, OfficialHiRED)):
        method = cls()
        chosen = method.select(given_signals(method, tiling, early, late), 11)
        counts[official] = tile_numbers(tiling, CPU)[chosen.kept].bincount(minlength=5).tolist()
    assert counts == {False: [6, 0, 3, 0, 2], True: [5, 1, 1, 1, 1]}


def test_hired_regions_follow_what_is_left_of_the_crops():
    """Rows 1 + 4 + 1 of the canvas: the marks in the thumbnail's middle are in the middle crop."""
    method, tiling = method_class("hired")(), TILINGS["without padding"].without_newlines()
    early, late = torch.zeros(16 + 24), torch.arange(40.0)
    early[4:12] = 1
    chosen = method.select(given_signals(method, tiling, early, late), 10)
    counts = tile_numbers(tiling, CPU)[chosen.kept].bincount(minlength=4)
    assert counts.tolist() == [5, 0, 5, 0]


def test_hired_full_tiles_pass_on_what_they_cannot_take():
    method, tiling = method_class("hired")(), TILINGS["without padding"].without_newlines()
    early, late = torch.zeros(40), torch.arange(40.0)
    early[:4] = 1  # the top row: first crop, 4 patches, and a bit of the second
    for keep in (30, 34, 39):
        kept = method.select(given_signals(method, tiling, early, late), keep).kept
        counts = tile_numbers(tiling, CPU)[kept].bincount(minlength=4).tolist()
        assert sum(counts) == keep
        assert counts[0] == max(min(round(keep / 2), 16), keep - 24)
        assert counts[1] == 4


@pytest.mark.parametrize(
    ("tower", "fields", "layers"),
    [
        ("clip", {}, [0, 22]),
        ("siglip", {"scores": "received"}, [0, 25]),
        ("windowed", {"scores": "received"}, [7, 31]),
        ("one layer", {}, [0]),
        ("clip", {"budget_layer": 2, "layer": -1}, [2, 23]),
    ],
)
def test_hired_layers(tower, fields, layers):
    needs = method_class("hired")(**fields).needs(shape_of(tower))
    assert [signal.layer for signal in needs] == layers
