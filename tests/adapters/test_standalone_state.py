"""A patched image encoder: nothing left out, nothing left behind, and calls beside each other."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import vlmprune
from kit import image_models, skips
from kit.image_models import OURS, TIMM, walk
from kit.snapshots import differences, snapshot
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, Dinov2Backbone, ViTForMaskedImageModeling
from vlmprune.prune.errors import (
    BudgetError,
    MethodFieldError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)

EACH = pytest.mark.parametrize("tiny", image_models.EVERY)
CASES = {tiny.name: tiny for tiny in (*OURS, *TIMM)}
SOME = pytest.mark.parametrize(
    "tiny",
    [
        pytest.param(CASES["CLIPModel"], id="clip"),
        pytest.param(CASES["Siglip classifier"], id="siglip"),
        pytest.param(CASES["Dinov2 classifier"], id="dinov2"),
        pytest.param(CASES["timm mean"], id="timm", marks=skips.needs("timm")),
        pytest.param(CASES["timm siglip"], id="timm pool", marks=skips.needs("timm")),
        pytest.param(CASES["timm eva02"], id="eva", marks=skips.needs("timm")),
    ],
)


@EACH
@pytest.mark.parametrize("name", ["tome", "evit", "expedit"])
def test_a_full_budget_changes_no_bit(tiny, name):
    if tiny.rotary and name == "expedit":
        name = "grid_encoder"
    model, pixels = tiny.model(), image_models.pixels()
    with torch.no_grad():
        dense = tiny.run(model, pixels)
        with vlmprune.patch(model, name, keep_ratio=1.0) as handle:
            assert torch.equal(tiny.run(model, pixels), dense)
            assert not handle.last.pruned
            assert handle.last.encoder == handle.last.stages == []
            assert handle.last.tokens_in == handle.last.tokens_kept == [36, 36]


@EACH
def test_it_leaves_nothing_behind(tiny):
    model, pixels = tiny.model(), image_models.pixels()
    with torch.no_grad():
        dense = tiny.run(model, pixels)
        before = snapshot(model)
        with vlmprune.patch(model, "tome", keep_ratio=0.5) as outer:
            first = tiny.run(model, pixels)
            with vlmprune.patch(model, "evit", keep_ratio=0.25) as inner:
                assert not torch.equal(tiny.run(model, pixels), first)
                assert inner.last.tokens_kept == [9, 9]
            assert outer.active and torch.equal(tiny.run(model, pixels), first)
            with outer.disabled():
                assert torch.equal(tiny.run(model, pixels), dense)
                assert "disabled" in outer.last.note
        assert differences(before, snapshot(model)) == []
        assert torch.equal(tiny.run(model, pixels), dense)
        vlmprune.patch(model, "tome", r=2)
        vlmprune.unpatch(model)
        assert differences(before, snapshot(model)) == []


@SOME
def test_a_block_that_raises_leaves_nothing_behind(tiny):
    model, pixels = tiny.model(), image_models.pixels()
    handle = vlmprune.patch(model, "tome", keep_ratio=0.5)
    blocks = handle._engine._images.encoder.blocks
    with torch.no_grad():
        expected = tiny.run(model, pixels)

        def stop(module, args):
            raise RuntimeError("stopped")

        hook = blocks[2].norm2.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stopped"):
            tiny.run(model, pixels)
        hook.remove()
        assert handle._engine._encoder.passage is None
        assert torch.equal(tiny.run(model, pixels), expected)
        handle.remove()


@SOME
def test_threads_do_not_meet(tiny):
    model = tiny.model()
    given = [image_models.pixels(1 + seed % 3, seed) for seed in range(12)]
    ratios = [(0.25, 0.5, 1.0)[seed % 3] for seed in range(12)]
    handle = vlmprune.patch(model, "tome", keep_ratio=0.5)

    def run(pixels, ratio):
        with torch.no_grad(), handle.budget(keep_ratio=ratio):
            return tiny.run(model, pixels), handle.last.tokens_kept

    expected = [run(*one) for one in zip(given, ratios, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, given, ratios))
    for one, two in zip(found, expected, strict=True):
        assert one[1] == two[1]
        torch.testing.assert_close(one[0], two[0])
    handle.remove()


@SOME
@pytest.mark.parametrize("name", ["tome", "evit"])
def test_gradients_are_those_of_the_loop(tiny, name):
    model, pixels = tiny.model(), image_models.pixels(1)
    if name == "tome":
        after, options = {n: 36 - 6 * (n + 1) for n in range(4)}, {"r": 6}
    else:
        after, options = {1: 18, 2: 9}, {"layers": (1, 2), "keep_ratio": 0.25}
    parts = tiny.parts(model)
    own = walk(parts, pixels[0], name, after, cls=tiny.cls, fuse=not tiny.rotary)
    parts.finish(own.rows, own.sizes).square().sum().backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    with vlmprune.patch(model, name, **options):
        tiny.run(model, pixels).square().sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert expected.keys() <= found.keys() and len(expected) > 20
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-3, rtol=1e-3, msg=key)


@SOME
@pytest.mark.parametrize("name", ["tome", "evit"])
def test_compiled_models_give_the_same(tiny, name):
    torch._dynamo.reset()
    model, pixels = tiny.model(), image_models.pixels()
    with vlmprune.patch(model, name, keep_ratio=0.25) as handle, torch.no_grad():
        expected = tiny.run(model, pixels)
        if hasattr(model, "get_image_features"):
            model.get_image_features = torch.compile(model.get_image_features, backend="eager")
            found = tiny.run(model, pixels)
        else:
            found = tiny.run(torch.compile(model, backend="eager"), pixels)
        assert torch.equal(found, expected)
        assert handle.last.tokens_kept == [9, 9]
    with pytest.raises(UnsupportedModelError, match="compiled already"):
        vlmprune.patch(torch.compile(model, backend="eager"), name, keep_ratio=0.25)


@SOME
def test_what_can_be_changed_and_shown(tiny):
    model, pixels = tiny.model(), image_models.pixels()
    handle = vlmprune.patch(model, "tome", keep_ratio=0.5)
    with pytest.raises(RuntimeError, match="Nothing to report yet"):
        _ = handle.last
    with torch.no_grad():
        tiny.run(model, pixels)
        assert handle.last.tokens_kept == [18, 18] and handle.last.tokens_per_layer == [[], []]
        assert {len(g) for g in handle.last.groups[0]} > {1}
        shown = handle.overlay(Image.new("RGB", (24, 24), "green"), index=1)
        assert min(shown.size) >= 448 and any("outline" in s for s in shown.info["legend"])
        handle.set(keep_tokens=12)
        tiny.run(model, pixels)
        assert handle.last.tokens_kept == [12, 12]
        handle.set("evit", rate=0.5, layers=(1,), fuse=False)
        tiny.run(model, pixels)
        assert handle.last.tokens_kept == [18, 18]
        assert handle.last.stages[0].method == "evit"
    assert handle.positions == "original" and handle.unread_layers == 0
    handle.remove()
    handle.remove()


@SOME
def test_what_is_refused(tiny):
    model = tiny.model()
    before = snapshot(model)
    refused = [
        (UnsupportedModelError, "no LLM here", "divprune", {"keep_ratio": 0.5}),
        (UnsupportedModelError, "no LLM here", "fastv", {"keep_ratio": 0.5, "layer": 2}),
        (BudgetError, "no LLM here", "tome", {"average_tokens": 12}),
        (BudgetError, "no LLM here", "evit", {"flops_ratio": 0.5}),
        (BudgetError, "each say how many", "tome", {"r": 4, "keep_ratio": 0.5}),
        (BudgetError, "needs|no published", "tome", {}),
        (MethodFieldError, "no LLM here", "tome", {"r": 4, "positions": "original"}),
        (MethodFieldError, "no LLM here", "tome", {"r": 4, "remember_images": 4}),
    ]
    if "Dinov2" not in tiny.name:  # which takes pictures of any size
        refused.append((BudgetError, "nearest count", "tome", {"keep_tokens": 1}))
    for error, text, name, options in refused:
        with pytest.raises(error, match=text):
            vlmprune.patch(model, name, **options)
    with pytest.raises(UnsupportedModelError, match="no LLM here"):
        vlmprune.patch(
            model, [vlmprune.method("tome", r=2), vlmprune.method("fastv", keep_ratio=0.5)]
        )
    assert differences(before, snapshot(model)) == []
    handle = vlmprune.patch(model, "tome", r=4)
    for change in (
        lambda: handle.set(flops_ratio=0.5),
        lambda: handle.budget(average_tokens=5),
        lambda: handle.budget(keep_tokens=[4, None]),
        lambda: handle.set("divprune", keep_ratio=0.5),
        lambda: handle.set("tome", r=2, positions="original"),
        lambda: copy.deepcopy(model),
    ):
        with pytest.raises(vlmprune.VlmpruneError):
            change()
    handle.remove()


@SOME
def test_checkpointed_blocks_are_refused_where_they_run_twice(tiny):
    model, pixels = tiny.model(), image_models.pixels()
    if tiny.timm:
        model.set_grad_checkpointing(True)
    else:
        model.activation_checkpointing_enable()
        model.train()
    with vlmprune.patch(model, "tome", r=4) as handle:
        with pytest.raises(UnsupportedFeatureError, match="gradient checkpointing"):
            tiny.run(model, pixels)
        with handle.disabled():
            tiny.run(model, pixels)
        with torch.no_grad():
            tiny.run(model, pixels)
        assert handle.last.tokens_kept == [20, 20]


@pytest.mark.parametrize("name", ["ViTModel", "Dinov2Model"])
def test_masks_of_all_patches_are_refused(name):
    tiny = CASES[name]
    model, pixels = tiny.model(), image_models.pixels()
    refused = pytest.raises(UnsupportedFeatureError, match="attention_mask")
    with vlmprune.patch(model, "tome", r=4), refused:
        model(pixels, attention_mask=torch.ones(2, 37))


@pytest.mark.parametrize("name, crops", [("CLIPModel", True), ("SiglipVisionModel", False)])
def test_pictures_are_shown_as_processors_bring_them(name, crops):
    tiny = CASES[name]
    model = tiny.model()
    with vlmprune.patch(model, "evit", keep_ratio=0.5) as handle, torch.no_grad():
        tiny.run(model, image_models.pixels())
    shown = handle.overlay(Image.new("RGB", (64, 24), "green"))
    assert any("hatched" in said.lower() for said in shown.info["legend"]) is crops


@SOME
def test_lower_precision_and_autocast(tiny):
    model, pixels = tiny.model(), image_models.pixels()
    with vlmprune.patch(model, "tome", r=6) as handle, torch.no_grad():
        expected = tiny.run(model, pixels)
        with torch.autocast("cpu", torch.bfloat16):
            found = tiny.run(model, pixels)
        assert found.isfinite().all() and handle.last.tokens_kept == [12, 12]
        model.to(torch.bfloat16)
        found = tiny.run(model, pixels.bfloat16())
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    assert found.isfinite().all() and handle.last.tokens_kept == [12, 12]


def test_a_model_around_a_patched_encoder_is_refused():
    model = CASES["CLIPModel"].model()
    vlmprune.patch(model.vision_model, "tome", r=4)
    with pytest.raises(UnsupportedModelError, match=r"unpatch\(model.vision_model\)"):
        vlmprune.patch(model, "tome", r=4)
    vlmprune.unpatch(model.vision_model)
    with vlmprune.patch(model, "tome", r=4) as handle:
        assert handle.active


def test_pictures_of_another_size():
    model = CASES["Dinov2Model"].model()
    with vlmprune.patch(model, "tome", keep_ratio=0.5) as handle, torch.no_grad():
        rows = model(torch.randn(3, 3, 16, 32)).last_hidden_state
    assert rows.shape[:2] == (3, 17)
    assert handle.last.tilings[0].tiles[0].rows == 4 and handle.last.tokens_in == [32] * 3


def test_hidden_states_are_the_rows_of_each_block():
    model = CASES["ViTModel"].model()
    with vlmprune.patch(model, "tome", r=6) as handle, torch.no_grad():
        states = model(image_models.pixels(), output_hidden_states=True).hidden_states
    assert [one.shape[1] - 1 for one in states] == [36, 30, 24, 18, 12]
    assert handle.last.tokens_kept == [12, 12]


@pytest.mark.parametrize("kind", ["text", "backbone", "masked"])
def test_other_classes_of_the_same_libraries_are_refused(kind):
    model = {
        "text": lambda: CLIPTextModel(
            CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=64)
        ),
        "backbone": lambda: Dinov2Backbone(image_models._DINOV2()),
        "masked": lambda: ViTForMaskedImageModeling(image_models._VIT()),
    }[kind]()
    with pytest.raises(UnsupportedModelError, match=r"CLIPVisionModel, .*VisionTransformer"):
        vlmprune.patch(model, "tome", r=4)
