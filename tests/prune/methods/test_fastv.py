"""FastV: its layer."""

import pytest
import torch
from kit.drawn import shape_of
from kit.golden import Golden, Runner, assert_equal, choose
from vlmprune.prune.contract import Method, TextAttention
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import method_class


def _fastv(golden: Golden, method: Method) -> None:
    row, params = golden.arrays["attn_last_row"], golden.params
    start, length = params["image_token_start_index"], params["image_token_length"]
    signal = TextAttention(params["fastv_k"] - 1)
    row_of_image = row.mean(0)[start : start + length]
    kept = choose(method, {signal: row_of_image}, params["keep"]).kept
    assert_equal(kept, golden.arrays["kept"])
    text = (torch.arange(start), torch.arange(start + length, row.shape[1]))
    assert_equal(torch.cat([text[0], kept + start, text[1]]), golden.arrays["kept_all"])


GOLDEN = {
    "fastv": Runner("fastv", lambda p: {"layer": p["fastv_k"]}, _fastv),
}


def test_fastv_layers():
    shape = shape_of()
    for given_layer, layer in ((2, 2), (3, 3), (31, 31), (-1, 31)):
        method = method_class("fastv")(layer=given_layer)
        assert [cut.layer for cut in method.cuts(shape)] == [layer]
        assert method.needs(shape) == (TextAttention(layer - 1),)
    for wrong in (32, -33, -32):
        with pytest.raises(MethodFieldError, match=f"layer={wrong} "):
            method_class("fastv")(layer=wrong).cuts(shape)
