"""HiPrune: anchors, buffers and registers by hand, its layers."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.drawn import DECODER, TOWERS, make_tokens, select, shape_of
from kit.golden import CLIP_L, MERGING, Golden, Runner, assert_equal, choose
from torch import Tensor
from vlmprune.prune.batches import ranked
from vlmprune.prune.contract import Method, ModelShape, Selection, Tower, VisualTokens
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.methods.before_llm.hiprune import HiPrune
from vlmprune.prune.ops.topk import top_k
from vlmprune.prune.registry import method_class
from vlmprune.prune.tiling import Tiling


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


GOLDEN = {
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
}


def hiprune_tokens(objects, deep, grid, tower="merging", **given_fields) -> VisualTokens:
    shape = shape_of(tower)
    needs = method_class("hiprune")(**given_fields).needs(shape)
    signals = dict(zip(needs, (objects, deep), strict=True))
    return VisualTokens(
        num_tokens=len(objects), tiling=Tiling.single(*grid), shape=shape, signals=signals
    )


def test_hiprune_by_hand():
    """5 x 6 tokens, 10 kept, half of them for one anchor with its buffers."""
    objects, deep = torch.zeros(30), torch.zeros(30)
    objects[14] = 1
    deep[[3, 7, 15, 21, 27, 29]] = torch.tensor([1.0, 2, 9, 3, 4, 5])  # 15 is a buffer already
    tokens = hiprune_tokens(objects, deep, (5, 6))
    kept = select("hiprune", tokens, 10, alpha=0.5)
    assert kept.tolist() == sorted([14, 13, 15, 8, 20, 29, 27, 21, 7, 3])


def test_hiprune_buffers_wrap_and_clamp():
    """As published: left of a row's first token is the row above, above the image is token 0."""
    objects = torch.zeros(30)
    objects[[6, 3]] = torch.tensor([2.0, 1.0])
    deep = torch.arange(30, 0, -1.0)
    tokens = hiprune_tokens(objects, deep, (5, 6))
    # anchors 6 and 3; buffers 5 (row above), 7, 0, 12 and 2, 4, 0 (clamped), 9; register 1
    assert select("hiprune", tokens, 10, alpha=1.0).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 9, 12]


def test_hiprune_takes_only_anchors_whose_buffers_fit():
    objects, deep = torch.zeros(30), torch.arange(30.0)
    objects[[14, 3]] = torch.tensor([2.0, 1.0])
    tokens = hiprune_tokens(objects, deep, (5, 6))
    # two anchors are called for, 8 tokens hold one with its four buffers
    assert select("hiprune", tokens, 8, alpha=1.0).tolist() == [8, 13, 14, 15, 20, 27, 28, 29]
    assert select("hiprune", tokens, 4, alpha=1.0).tolist() == [26, 27, 28, 29]


@given(st.integers(1, 29), st.floats(0, 1), st.sampled_from(sorted(TOWERS)))
def test_hiprune_is_exact_for_every_alpha(keep, alpha, tower):
    method = method_class("hiprune")(alpha=alpha)
    tokens = make_tokens(method, (5, 6), tower=tower, seed=keep)
    assert len(method.select(tokens, keep).kept.unique()) == keep


def test_hiprune_official_keeps_too_few_where_patches_merge():
    generator = torch.Generator().manual_seed(4)
    objects, deep = torch.rand(2, 100, generator=generator)
    deep[objects.argmax()] = 50  # subtracting 1 does not keep the anchor out of the registers
    tokens = hiprune_tokens(objects, deep, (10, 10))
    exact, official = (m.select(tokens, 40).kept for m in (HiPrune(), OfficialHiPrune()))
    assert len(official) < len(exact) == 40
    assert set(official.tolist()) < set(exact.tolist())


@pytest.mark.parametrize(
    ("tower", "layers"),
    [
        (TOWERS["clip"], [8, 22]),
        (TOWERS["no cls"], [9, 25]),
        (TOWERS["merging"], [15, 31]),
        (Tower(num_layers=32, has_cls=False, merge_unit=4), [15, 31]),
        (Tower(num_layers=8, has_cls=False, merge_unit=4, full_attention=(1, 5)), [5, 5]),
        (Tower(num_layers=3, has_cls=True), [1, 1]),
    ],
)
def test_hiprune_layers(tower, layers):
    shape = ModelShape(tower=tower, decoder=DECODER)
    found = [signal.layer for signal in method_class("hiprune")().needs(shape)]
    assert found == list(dict.fromkeys(layers))


def test_hiprune_layers_of_the_user():
    shape = shape_of("clip")
    method = method_class("hiprune")(object_layer=3, deep_layer=-1)
    assert [signal.layer for signal in method.needs(shape)] == [3, 23]
    with pytest.raises(MethodFieldError, match=r"object_layer=24.*0\.\.23"):
        method_class("hiprune")(object_layer=24).needs(shape)
    with pytest.raises(MethodFieldError, match=r"deep_layer=-2.*windowed.*7, 15, 23, 31"):
        method_class("hiprune")(deep_layer=-2).needs(shape_of("merging"))
