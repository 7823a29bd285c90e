"""FoPru: rows and axes by hand."""

import pytest
import torch
from kit.tiles import given_signals, shape_of
from vlmprune.prune.contract import AttentionToCls, ClsAttention, ReceivedAttention
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Block, Tiling

RECEIVED = [0.5, 0.9, 0.1, 0.8, 0.7, 0.2]
FROM_CLS = [0.1, 0.7, 0.0, 0.1, 0.1, 0.1]  # leaves .4 .2 .1 / .7 .6 .1


def test_fopru_leaves_out_what_cls_gives():
    method = method_class("fopru")()
    tokens = given_signals(method, Tiling.single(2, 3), RECEIVED, FROM_CLS)
    assert [method.select(tokens, k).kept.tolist() for k in (2, 3)] == [[3, 4], [0, 3, 4]]
    tokens = given_signals(method, Tiling.single(2, 3), RECEIVED, tower="siglip")
    assert method.select(tokens, 2).kept.tolist() == [1, 3]


def test_fopru_rows():
    """Whole rows first; the next row gives its best tokens."""
    method = method_class("fopru")(strategy="row")
    tokens = given_signals(method, Tiling.single(2, 3), RECEIVED, FROM_CLS)
    kept = [method.select(tokens, k).kept.tolist() for k in (1, 2, 3, 4, 5)]
    assert kept == [[3], [3, 4], [3, 4, 5], [0, 3, 4, 5], [0, 1, 3, 4, 5]]


def test_fopru_rows_of_tiles():
    """Rows of tiles beside each other are two; longer rows win by their mean, not their sum."""
    method = method_class("fopru")(strategy="row", scope="image")
    tiling = Tiling((Block((1,), (2,)), Block((2,), (3, 1))))
    received = [5, 5, 4, 4, 4, 1, 2, 2, 2, 6]
    tokens = given_signals(method, tiling, received, [0] * 10)
    assert select(method, tokens, 4).kept.tolist() == [0, 1, 2, 9]
    assert select(method, tokens, 9).kept.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize(("spread", "best"), [(0.1, 3), (2.0, 1)])
def test_fopru_takes_the_axis_that_varies_more(spread, best):
    method = method_class("fopru")(axis="auto")
    to_cls = torch.tensor([0.5, 0.0, 0.5, 0.5, 0.5, 0.5]) * spread
    tokens = given_signals(method, Tiling.single(2, 3), RECEIVED, FROM_CLS, to_cls)
    assert method.select(tokens, 1).kept.tolist() == [best]
    given = method_class("fopru")(axis="given")
    tokens = given_signals(given, Tiling.single(2, 3), to_cls)
    assert given.select(tokens, 2).kept.tolist() == [0, 1], "1 gives least to CLS; ties to 0"


def test_fopru_needs():
    clip, siglip = shape_of(), shape_of("siglip")
    received, cls, to_cls = ReceivedAttention(22), ClsAttention(22), AttentionToCls(22)
    needs = {
        axis: [method_class("fopru")(axis=axis).needs(shape) for shape in (clip, siglip)]
        for axis in ("received", "given", "auto")
    }
    assert needs["received"] == [(received, cls), (ReceivedAttention(25),)]
    assert needs["auto"] == [(received, cls, to_cls), (ReceivedAttention(25),)]
    assert needs["given"][0] == (to_cls,)
    assert siglip.lacks(needs["given"][1][0])
