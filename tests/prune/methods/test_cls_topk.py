"""cls_topk: by tile and by image, its layers."""

import pytest
from kit.tiles import given_signals, shape_of
from vlmprune.prune.contract import ClsAttention, ReceivedAttention
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Block, Tiling


def test_cls_topk_by_tile_and_by_image():
    tiling = Tiling((Block((1,), (4,)), Block((1,), (2, 2), "rows")))
    scores = [0.1, 0.9, 0.8, 0.7, 0.3, 0.2, 0.4, 0.5]
    for scope, kept in (("tile", [1, 2, 4, 7]), ("image", [1, 2, 3, 7])):
        method = method_class("cls_topk")(scope=scope)
        assert select(method, given_signals(method, tiling, scores), 4).kept.tolist() == kept


@pytest.mark.parametrize(
    ("tower", "fields", "needs"),
    [
        ("clip", {}, ClsAttention(22)),
        ("clip", {"layer": -1}, ClsAttention(23)),
        ("clip", {"scores": "received"}, ReceivedAttention(22)),
        ("siglip", {"scores": "received"}, ReceivedAttention(25)),
        ("windowed", {"scores": "received"}, ReceivedAttention(31)),
        ("one layer", {}, ClsAttention(0)),
    ],
)
def test_cls_topk_layers(tower, fields, needs):
    assert method_class("cls_topk")(**fields).needs(shape_of(tower)) == (needs,)
