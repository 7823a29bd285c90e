"""Analytic FLOPs equal torch's counter; the literature's convention gives its published figures."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from torch.utils.flop_counter import FlopCounterMode
from vlmprune.adapters.family import IMAGE
from vlmprune.adapters.registry import family_of
from vlmprune.eval.flops import _windows, model_cost, visual_flops, visual_share
from vlmprune.prune.contract import Decoder
from zoo import ALL, ATTENTION, BOTH_FAMILIES, CASES, Case

ROW = (4, "B", 6)  # Qwen: 3 x 5 tokens in windows of 2 x 2, so some are smaller
TEXT = 10


def analytic(case: Case, model, visual_per_layer, **options):
    extra = 2 if case.qwen else 0  # start and end of vision
    return model_cost(model).sample(
        pictures=family_of(model).pictures(model, IMAGE, case.inputs([ROW]))[0],
        visual_per_layer=visual_per_layer,
        text_tokens=TEXT + extra,
        **options,
    )


@ALL
@ATTENTION
def test_dense_prefill_equals_torch(case: Case, attention: str):
    model = case.model(attention)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(**case.inputs([ROW]), logits_to_keep=1)
    flops = analytic(case, model, [case.num_tokens("B")] * 4)
    assert flops.first_token == counter.get_total_flops()
    parts = counter.get_flop_counts()
    name = type(model).__name__
    assert flops.prefill == sum(parts[f"{name}.model.language_model"].values())
    tower = "visual" if case.qwen else "vision_tower"
    vision = flops.vision + (flops.projector if case.qwen else 0)  # Qwen's merger is in its tower
    assert vision == sum(parts[f"{name}.model.{tower}"].values())


@BOTH_FAMILIES
@pytest.mark.parametrize("name", ["grid", "fastv"])
def test_patched_prefill_equals_torch_but_for_the_probes(case: Case, name: str):
    model = case.model()
    with vlmprune.patch(model, name, keep_tokens=7) as handle:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            model(**case.inputs([ROW]), logits_to_keep=1)
        (entering,) = handle.last.tokens_per_layer
    expected = analytic(case, model, entering).first_token
    # FastV reads one attention row: a q of one token, and its products with all keys.
    probe = counter.get_total_flops() - expected
    assert entering[-1] == 7
    assert probe == 0 if name == "grid" else 0 <= probe < 0.02 * expected


def test_decoding_equals_torch():
    case = CASES["llava-clip-mistral"]
    model = case.model()
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.generate(**case.inputs([ROW]), max_new_tokens=5, min_new_tokens=5, do_sample=False)
    flops = analytic(case, model, [case.num_tokens("B")] * 4, new_tokens=5)
    assert flops.decode > 0
    assert flops.first_token + flops.decode == counter.get_total_flops()


def test_several_images_and_none_add_up():
    case = CASES["llava-clip-llama"]
    model = case.model()
    cost = model_cost(model)
    n = case.num_tokens("B")
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(**case.inputs([(3, "A", 2, "B", 5)]), logits_to_keep=1)
    two = cost.sample(pictures=[case.grid("A")] * 2, visual_per_layer=[2 * n] * 4, text_tokens=10)
    assert two.first_token == counter.get_total_flops()
    none = cost.sample(pictures=[], visual_per_layer=[0] * 4, text_tokens=10)
    assert none.vision == none.projector == 0
    assert none.prefill == cost.prefill([10] * 4)


def test_windows_tile_the_grid():
    assert _windows((4, 6), 2) == [4] * 6
    assert sorted(_windows((5, 3), 2)) == [1, 2, 2, 2, 4, 4]
    assert _windows((3, 5), 0) == [15]


LLAMA_7B = Decoder(num_layers=32, hidden_size=4096, intermediate_size=11008)


@pytest.mark.parametrize(
    ("layers", "published"),
    [
        pytest.param([576] * 32, 3.82, id="LLaVA-1.5-7B"),
        pytest.param([2880] * 32, 20.83, id="LLaVA-NeXT-7B"),
        pytest.param([576] * 8 + [288] * 8 + [144] * 8 + [72] * 8, 1.78, id="PyramidDrop"),
        pytest.param([576] * 7 + [504] * 2 + [360] * 3 + [72] * 20, 1.56, id="TransPrune-High"),
        pytest.param(
            [2880] * 7 + [2520] * 2 + [1800] * 3 + [360] * 20, 8.33, id="TransPrune-High-NeXT"
        ),
        pytest.param([576] * 2 + [288] * 30, 2.01, id="FastV-half"),
        pytest.param([576] * 2 + [144] * 30, 1.12, id="FastV-quarter"),
    ],
)
def test_published_teraflops(layers, published):
    assert abs(visual_flops(layers, LLAMA_7B) / 1e12 - published) < 0.0051


def test_visual_share():
    assert visual_share([576] * 32, 576, LLAMA_7B) == 1
    assert visual_share([0] * 32, 0, LLAMA_7B) == 1
    quarter = visual_share([144] * 32, 576, LLAMA_7B)
    assert 0.23 < quarter < 0.25  # attention is quadratic
