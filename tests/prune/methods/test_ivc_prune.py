"""IVC-Prune: coordinates, seeds and what is near them; a cut that empties the caches below it."""

import pytest
import torch
import vlmprune
from kit import zoo
from kit.decoder import average, layers_of, stages
from kit.decoder_kinds import stored_lengths
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from kit.oracle import decoder_of
from vlmprune.adapters.cache_names import CACHE
from vlmprune.prune import scores
from vlmprune.prune.contract import LayerValues, Method, RotaryMeans, TextValues
from vlmprune.prune.errors import BudgetError, MethodFieldError, UnsupportedFeatureError
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.tiling import Tiling

LLAVA = zoo.CASES["llava-clip-llama"]


def _ivc(golden: Golden, ivc: Method) -> None:
    arrays, params = golden.arrays, golden.params
    start, count, layer = params["image_start"], params["n_image"], params["ivcp_k"]
    values = arrays["values"].transpose(0, 1)
    before, own, behind = values.split([start, count, len(values) - start - count])
    tables = [arrays[name].view(-1, count, params["head_dim"]) for name in ("cos", "sin")]
    signals = {
        LayerValues(layer - 1): own,
        TextValues(layer - 1): behind,
        TextValues(layer - 1, part="all"): torch.cat([before, behind]),
        RotaryMeans(layer - 1): scores.rotary_means(*tables),
    }
    keep = None if ivc.rule == "union" else ivc.most(count)
    tiling = Tiling.single(1, count)
    chosen = choose(ivc, signals, keep, shape=CLIP_L, layer=layer, tiling=tiling)
    assert_equal(chosen.kept, arrays["kept"])
    for name in ("seeds", "coordinates"):
        assert torch.isin(arrays[name], chosen.kept).all()


GOLDEN = {
    "ivc": Runner(
        "ivc_prune",
        lambda p: {
            "layer": p["ivcp_k"],
            "rule": {"llava": "union", "qwen": "quota"}[p["port"]],
        },
        _ivc,
    ),
}


def test_counts_and_layers():
    assert stages(method("ivc_prune"), 576) == [(16, 288)]
    assert average(method("ivc_prune", average_tokens=400), 576) == 400
    assert layers_of("ivc_prune", 28) == [14] and layers_of("ivc_prune", 36, layer=22) == [22]
    with pytest.raises(MethodFieldError, match="layer=0"):
        layers_of("ivc_prune", 32, layer=0)
    with pytest.raises(BudgetError, match=r"keep_ratio=0\.5 with rule='union'"):
        method("ivc_prune", rule="union", keep_ratio=0.5)


@pytest.mark.parametrize("keep", [1, 2, 3, 4, 8, 33, 60])
def test_seeds_and_coordinates_fit_into_every_budget(keep):
    made = method_class("ivc_prune")(layer=1)
    generator = torch.Generator().manual_seed(keep)
    values, text = (torch.randn(n, 2, 4, generator=generator) for n in (64, 9))
    angles = torch.rand(64, 2, generator=generator)
    signals = dict(zip(made.needs(CLIP_L), (values, text, angles), strict=True))
    chosen = choose(made, signals, keep, layer=1)
    assert chosen.count == keep
    for column in angles.unbind(1):
        assert torch.isin(column.topk(round(0.2 * keep)).indices, chosen.kept).all()


def test_the_union_equals_the_quota_s_parts():
    """A fifth near the text, one seed, a twentieth for each of cosine and sine."""
    made = method_class("ivc_prune")(layer=1, rule="union")
    values, text = torch.eye(40)[:, None], torch.eye(40)[[0, 1, 7], None] * 9
    angles = torch.stack([torch.arange(40.0), -torch.arange(40.0)], 1)
    signals = dict(zip(made.needs(CLIP_L), (values, text, angles, text), strict=True))
    kept = choose(made, signals, None, layer=1).kept.tolist()
    assert kept == [0, 1, 2, 3, 4, 5, 6, 7, 38, 39]


def test_positions_on_two_axes_tie():
    angle = torch.rand(3, 5, generator=torch.Generator().manual_seed(0)) * 100
    cos, sin = angle.cos()[..., None], angle.sin()[..., None]
    assert_equal(*(scores.rotary_means(cos[axes], sin[axes]) for axes in ([0, 1, 2], [2, 0, 1])))


# --- Caches below the cut ------------------------------------------------------------------------


@torch.no_grad()
def test_the_cache_is_as_short_in_every_layer():
    model, inputs = LLAVA.model(), LLAVA.inputs(zoo.SINGLE)
    handle = vlmprune.patch(model, "ivc_prune", keep_tokens=5)
    lengths = stored_lengths(model(**inputs)[CACHE])
    text = handle.last.text_tokens[0]
    assert lengths == [text + 5] * len(decoder_of(model).layers)
    assert handle.last.stages[0].below and handle.last.tokens_per_layer[0][0] == 36


@pytest.mark.parametrize(
    ("options", "word"),
    [({"cache_implementation": "static"}, "DynamicCache"), ({"use_cache": False}, "use_cache")],
)
def test_caches_that_cannot_forget_are_refused(options, word):
    model = LLAVA.model()
    vlmprune.patch(model, "ivc_prune", keep_ratio=0.5)
    with pytest.raises(UnsupportedFeatureError, match=word):
        model.generate(**LLAVA.inputs(zoo.SINGLE), max_new_tokens=2, do_sample=False, **options)


def test_it_does_not_go_with_a_method_on_the_cache():
    two = [vlmprune.method(n, keep_ratio=r) for n, r in (("ivc_prune", 0.5), ("visual_press", 0.2))]
    with pytest.raises(MethodFieldError, match=r"ivc_prune .* visual_press"):
        vlmprune.patch(LLAVA.model(), two)
