"""VScan: windows and deep picks, what is merged, both stages."""

import pytest
import torch
from kit.decoder import average, model, stages
from kit.drawn import make_tokens, shape_of
from kit.golden import CLIP_L, MERGING, Golden, Runner, assert_equal, choose
from kit.schedules import text_attention
from vlmprune.prune.contract import (
    ClsAttention,
    Features,
    LayerSignal,
    Method,
    Place,
    ReceivedAttention,
    TextAttention,
)
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.ops.windows import numbers_of, ranks
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.tiling import Tiling


def _close(ours, golden) -> None:
    torch.testing.assert_close(ours, golden, rtol=1e-4, atol=1e-5)


def _llava(golden: Golden, method: Method) -> None:
    arrays, params = golden.arrays, golden.params
    layers = ClsAttention(params["shallow_layer"]), ClsAttention(params["deep_layer"])
    assert method.needs(CLIP_L)[:2] == layers
    for tile in range(params["tiles"]):
        rows = (arrays[f"cls_{which}"][tile].mean(0) for which in ("shallow", "deep"))
        signals = dict(zip(layers, rows, strict=True)) | {Features(): arrays["features"][tile]}
        chosen = choose(method, signals, params["per_tile"])
        assert_equal(chosen.kept, arrays["kept"][tile])
        _close(chosen.features, arrays["out_features"][tile])


def _qwen(golden: Golden, method: Method) -> None:
    arrays, params = golden.arrays, golden.params
    layers = (ReceivedAttention(params[f"{which}_layer"]) for which in ("shallow", "deep"))
    signals = {
        layer: arrays[f"received_{which}"]
        for layer, which in zip(layers, ("shallow", "deep"), strict=True)
    }
    assert method.needs(MERGING)[:2] == tuple(signals)
    signals[Features()] = arrays["features"]
    tiling = Tiling.single(*params["grid"])
    chosen = choose(method, signals, params["n_kept"], shape=MERGING, tiling=tiling)
    assert_equal(chosen.kept, arrays["kept"])
    _close(chosen.features, arrays["out_features"])


def _second_stage(golden: Golden, method: Method) -> None:
    params, layer = golden.params, golden.params["layer_0based"]
    depth = 32 if params["port"] == "llava" else 28
    assert [cut.layer for cut in method.cuts(model(depth))] == [0, layer]
    query, keys = golden.arrays["q_last"][:, None], golden.arrays["k"]
    start, count = params["image_start"], params["n_image"]
    row = text_attention(golden, query, keys, torch.arange(count))
    signals = {TextAttention(layer, rows="last", ahead=True): row}
    kept = choose(method, signals, params["keep"], shape=model(depth), layer=layer).kept
    assert_equal(kept, golden.arrays["kept"])
    length = keys.shape[1]
    places = torch.cat([torch.arange(start), start + kept, torch.arange(start + count, length)])
    if params["port"] == "llava":
        assert method.positions == "repacked"
        places = torch.arange(len(places))
    assert_equal(places, golden.arrays["positions"])


GOLDEN = {
    "vscan_llava": Runner("vscan", lambda p: {"late": False}, _llava),
    "vscan_qwen": Runner("vscan", lambda p: {"scores": "received", "late": False}, _qwen),
    "vscan_llm": Runner("vscan", lambda p: {}, _second_stage),
}


def test_windows_take_what_lies_beyond_the_last():
    assert numbers_of((2, 5), 2) == (0, 0, 1, 1, 1) * 2
    assert numbers_of((1, 3), 4) == (0, 0, 0)


def test_ranks_in_windows():
    windows = torch.tensor([[0, 0, 1, 1, 1]])
    scores = torch.tensor([[0.1, 0.2, 0.3, 0.5, 0.3]])
    assert ranks(scores, windows).tolist() == [[1, 0, 1, 0, 2]]


def _tokens(scores: str, shallow, deep, grid):
    chosen = method_class("vscan")(scores=scores)
    tokens = make_tokens(chosen, grid, tower="clip" if scores == "cls" else "merging")
    one, two = chosen.needs(tokens.shape)[:2]
    tokens.signals[one], tokens.signals[two] = torch.tensor(shallow), torch.tensor(deep)
    return chosen, tokens


def test_half_comes_from_every_window_and_half_from_anywhere():
    """Two windows of 6 x 6 side by side: the best of each, though the first three lie in one."""
    shallow = [0.0] * 72
    shallow[0], shallow[1], shallow[2], shallow[7] = 0.9, 0.8, 0.7, 0.1
    deep = [i / 100 for i in range(72)]
    deep[7] = 0.9
    chosen, tokens = _tokens("cls", shallow, deep, (6, 12))
    assert chosen.select(tokens, 4).kept.tolist() == [0, 7, 70, 71]
    # An odd one, and one that two windows cannot share, go to the deep layer.
    assert chosen.select(tokens, 5).kept.tolist() == [0, 7, 69, 70, 71]
    assert chosen.select(tokens, 7).kept.tolist() == [0, 7, 67, 68, 69, 70, 71]
    assert chosen.select(tokens, 2).kept.tolist() == [7, 71]


def test_by_received_attention_a_slack_of_quotas_goes_to_the_best():
    """Two windows of 4 x 4, three local tokens: two at most of each, the three best of those."""
    shallow = [0.0] * 32
    shallow[0], shallow[1], shallow[2], shallow[4] = 0.9, 0.8, 0.7, 0.1
    deep = [i / 100 for i in range(32)]
    chosen, tokens = _tokens("received", shallow, deep, (4, 8))
    assert chosen.select(tokens, 6).kept.tolist() == [0, 1, 4, 29, 30, 31]


def test_every_token_is_in_one_row():
    chosen = method_class("vscan")()
    tokens = make_tokens(chosen, (9, 8))
    found = chosen.select(tokens, 20)
    row, member = found.groups
    assert member.sort().values.tolist() == list(range(72)) and found.projected
    features = tokens.signals[Features()]
    for number, rows in enumerate(found.features):
        torch.testing.assert_close(rows, features[member[row == number]].mean(0))
        assert found.kept[number] in member[row == number]


def test_both_stages_of_a_budget():
    assert stages(method("vscan", keep_tokens=32), 576) == [(0, 96), (16, 32)]
    assert average(method("vscan", keep_tokens=32), 576) == 64
    assert stages(method("vscan", average_tokens=64), 576) == [(0, 96), (16, 32)]
    assert stages(method("vscan", late=False, keep_tokens=96), 576) == [(0, 96)]
    assert stages(method("vscan", keep_ratio=0.5), 576) == [(16, 288)]
    assert stages(method("vscan", keep_tokens=32, layer=14), 576) == [(0, 96), (14, 32)]


def test_places_and_fields():
    cls, shape = method_class("vscan"), shape_of()
    assert cls().places == (Place.BEFORE_LLM, Place.DECODER)
    assert cls(late=False).places == (Place.BEFORE_LLM,)
    assert not any(isinstance(need, LayerSignal) for need in cls(late=False).needs(shape))
    for wrong in ({"late": 1}, {"scores": "text"}, {"shallow_layer": 2.5}, {"layer": "16"}):
        (field,) = wrong
        with pytest.raises(MethodFieldError, match=f"{field}="):
            cls(**wrong)
    with pytest.raises(MethodFieldError, match="layer=0 "):
        cls(layer=0).cuts(shape)
