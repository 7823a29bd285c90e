"""VTC-CLS: what it sums and which layers it reads."""

import pytest
from kit.golden import LLAMA_7B, Golden, Runner, assert_equal, choose
from kit.tiles import given_signals, shape_of
from kit.tilings import DECODER
from vlmprune.prune.contract import ClsAttention, Method, ModelShape, Tower
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import method_class
from vlmprune.prune.tiling import Tiling


def _vtc_cls(golden: Golden, method: Method) -> None:
    rows = golden.arrays["cls_rows"]
    tower = Tower(num_layers=golden.params["layers"], has_cls=True)
    shape = ModelShape(tower=tower, decoder=LLAMA_7B)
    signals = {ClsAttention(i): row.mean(0)[1:] for i, row in enumerate(rows)}
    chosen = choose(method, signals, golden.params["token_num"], shape=shape)
    assert_equal(chosen.kept, golden.arrays["kept"])


GOLDEN = {
    "vtccls": Runner("vtc_cls", lambda p: {"layer": p["start_layer"]}, _vtc_cls),
}


def test_vtc_cls_sums_received_attention():
    method = method_class("vtc_cls")(scores="received")
    layers = [signal.layer for signal in method.needs(shape_of("windowed"))]
    assert layers == [23, 31]
    tokens = given_signals(
        method, Tiling.single(1, 4), [0, 3, 2, 0], [0, 0, 2, 3.5], tower="windowed"
    )
    assert method.select(tokens, 2).kept.tolist() == [2, 3]
    method = method_class("vtc_cls")(scores="received", layer=24)
    with pytest.raises(MethodFieldError, match=r"layer=24.*windowed.*7, 15, 23, 31"):
        method.needs(shape_of("windowed"))


@pytest.mark.parametrize(
    ("depth", "given_layer", "layers"),
    [
        (24, None, range(16, 23)),
        (24, 10, range(10, 23)),
        (24, -3, range(21, 23)),
        (12, None, range(8, 11)),
        (2, None, range(0, 1)),
    ],
)
def test_vtc_cls_layers(depth, given_layer, layers):
    shape = ModelShape(tower=Tower(num_layers=depth, has_cls=True), decoder=DECODER)
    needs = method_class("vtc_cls")(layer=given_layer).needs(shape)
    assert needs == tuple(ClsAttention(layer) for layer in layers)


def test_vtc_cls_refuses_the_last_layer():
    with pytest.raises(MethodFieldError, match=r"layer=-1 .*use 0\.\.22"):
        method_class("vtc_cls")(layer=-1).needs(shape_of())
