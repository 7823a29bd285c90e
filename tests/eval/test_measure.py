"""Measuring `generate` and evaluating a cell, on tiny random models."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import vlmprune
from kit.fakes import FakeProcessor, FakeTask
from kit.words import tokenizer
from kit.zoo import BOTH_FAMILIES, CASES, Case, hooks
from transformers import AutoProcessor
from transformers.models.smolvlm import processing_smolvlm
from vlmprune.eval.measure import answering
from vlmprune.eval.measure.evaluate import Evaluator
from vlmprune.eval.measure.times import kv_bytes, measure
from vlmprune.eval.models.loading import ModelLoadError, fingerprint, load, resolve_device
from vlmprune.prune.budget import layer_flops

CLIP = CASES["llava-clip-llama"]
HEAD_SIZE, KV_HEADS, LAYERS = 16, 4, 4  # of CLIP's decoder


def evaluator(case: Case, batch_size: int = 4, answers: list[str] | None = None) -> Evaluator:
    task = FakeTask(answers)
    return Evaluator(
        case.model(),
        FakeProcessor(case),
        task,
        task.questions(None),
        batch_size=batch_size,
        timed_questions=2,
    )


# --- measure ---------------------------------------------------------------------------------


def test_the_cache_is_measured_layer_by_layer():
    model, inputs = CLIP.model(), CLIP.inputs([(4, "A", 6)])
    text, visual = 10, CLIP.num_tokens("A")
    per_token = 2 * KV_HEADS * HEAD_SIZE * 4  # keys and values, float32
    dense = measure(model, [inputs])
    assert dense.kv_bytes == (visual + text) * LAYERS * per_token
    pruned = measure(model, [inputs], calls=[vlmprune.method("fastv", keep_tokens=5, layer=3)])
    assert pruned.kv_bytes == (3 * (visual + text) + 5 + text) * per_token


def test_times_have_all_parts_and_nothing_stays_on_the_model():
    model, inputs = CLIP.model(), CLIP.inputs([(4, "A", 6)])
    model.generate(**inputs, max_new_tokens=1)  # transformers installs its own hooks once
    before = hooks(model)
    calls = [vlmprune.method("divprune", keep_tokens=5)]
    found = measure(model, [inputs] * 3, calls=calls, new_tokens=4)
    times = found.timings
    assert {len(part) for part in vars(times).values()} == {3}
    for total, vision, select, rest in zip(
        times.first_token, times.vision, times.select, times.prefill, strict=True
    ):
        assert 0 < vision < total and 0 < select < total
        assert vision + select + rest == pytest.approx(total)
    assert all(step > 0 for step in times.per_decoded_token)
    for pruned, dense, share in zip(
        times.first_token, times.dense_first_token, times.share_of_dense, strict=True
    ):
        assert share == pytest.approx(pruned / dense)
    assert not measure(model, [inputs]).timings.share_of_dense
    assert set(times.summary()) == set(vars(times))
    assert found.peak_memory_bytes is None  # on the CPU nothing is claimed
    assert hooks(model) == before


def test_kv_bytes_of_a_cache_that_was_never_used():
    from transformers import DynamicCache

    assert kv_bytes(DynamicCache()) == 0


# --- Evaluator -------------------------------------------------------------------------------


@BOTH_FAMILIES
@pytest.mark.parametrize("name", [None, "grid", "fastv"])
def test_left_padded_batches_answer_like_single_questions(case: Case, name):
    calls = [vlmprune.method(name, keep_ratio=0.3)] if name else []
    alone, together = (evaluator(case, batch).run(calls) for batch in (1, 6))
    assert [s.prediction for s in alone[1]] == [s.prediction for s in together[1]]
    assert alone[0]["tokens"] == together[0]["tokens"]
    assert alone[0]["flops"] == together[0]["flops"]


@BOTH_FAMILIES
def test_a_cell_reports_what_was_kept_and_what_it_costs(case: Case):
    bench = evaluator(case)
    dense, samples = bench.run()
    images = [case.num_tokens(letter) for letter in "ABCABC"]
    assert [s.kept for s in samples] == images
    assert dense["tokens"]["in_per_image"] == dense["tokens"]["kept_per_image"]
    assert dense["tokens"]["average_per_layer"] == dense["tokens"]["average_after_cuts"]
    assert dense["tokens"]["text"] == {False: 8.5, True: 10.5}[case.packed]
    assert dense["flops"]["visual_share"] == dense["flops"]["prefill_share"] == 1
    answers = [s.prediction for s in samples]

    bench = evaluator(case, answers=answers)
    assert bench.run()[0]["scores"]["accuracy"]["outcomes"] == [1.0] * 6
    pruned, _ = bench.run([vlmprune.method("fastv", keep_tokens=6, layer=1)])
    tokens = pruned["tokens"]
    mean = sum(images) / 6
    assert tokens["in_per_image"] == pytest.approx(mean)
    assert tokens["kept_per_image"] == 6
    assert tokens["per_layer"] == pytest.approx([mean, 6, 6, 6])
    assert tokens["average_per_layer"] == pytest.approx((mean + 18) / 4)
    assert tokens["average_after_cuts"] == pytest.approx(6)  # the cut is behind the first layer
    decoder = case.shape.decoder
    shares = [
        (layer_flops(n, decoder) + 3 * layer_flops(6, decoder)) / (4 * layer_flops(n, decoder))
        for n in images
    ]
    assert pruned["flops"]["visual_share"] == pytest.approx(sum(shares) / 6)
    assert pruned["flops"]["visual_share"] < pruned["flops"]["prefill_share"] < 1  # text stays
    # LLaVA's last encoder layer, which nobody reads, does not run.
    assert pruned["flops"]["vision"] <= dense["flops"]["vision"]
    assert (pruned["flops"]["vision"] == dense["flops"]["vision"]) == case.packed
    assert pruned["kv_bytes"] < dense["kv_bytes"]
    assert pruned["positions"] == "original"
    accuracy = pruned["scores"]["accuracy"]
    assert accuracy["n"] == 6 and 6 * accuracy["value"] == sum(accuracy["outcomes"])
    assert {kind: entry["n"] for kind, entry in accuracy["by_kind"].items()} == {
        "long": 3,
        "short": 3,
    }


@BOTH_FAMILIES
def test_several_methods_act_together(case: Case):
    calls = [
        vlmprune.method("divprune", keep_tokens=8),
        vlmprune.method("fastv", keep_tokens=3, layer=2),
    ]
    both, samples = evaluator(case).run(calls)
    assert both["tokens"]["per_layer"] == [8, 8, 3, 3]
    assert both["tokens"]["kept_per_image"] == 3
    assert both["tokens"]["average_per_layer"] == 5.5
    assert both["tokens"]["average_after_cuts"] == 4.25
    first, _ = evaluator(case).run(calls[:1])
    assert both["kv_bytes"] < first["kv_bytes"]
    assert both["flops"]["visual_share"] < first["flops"]["visual_share"]
    assert [s.kept for s in samples] == [3] * 6


def test_a_failing_method_leaves_the_model_unpatched():
    bench = evaluator(CASES["llava-siglip-qwen2"])
    before = hooks(bench.model)
    with pytest.raises(vlmprune.MissingSignalError):
        bench.run([vlmprune.method("vtc_cls", keep_ratio=0.5)])
    assert hooks(bench.model) == before


def test_answers_end_with_their_end_token():
    model = CLIP.model()
    model.generation_config.eos_token_id = [7, 9]
    assert answering._length(model, [3, 9, 0, 0]) == 2
    assert answering._length(model, [3, 4, 5]) == 3
    model.generation_config.eos_token_id = 4
    assert answering._length(model, [3, 4, 4]) == 2


# --- Loading ---------------------------------------------------------------------------------


def test_the_fingerprint_is_of_the_weights_not_of_the_object(tmp_path):
    model = CLIP.model()
    same = fingerprint(model)
    assert fingerprint(CLIP.model("eager")) == same
    model.save_pretrained(tmp_path)
    assert fingerprint(type(model).from_pretrained(tmp_path)) == same
    with torch.no_grad():
        model.lm_head.weight += 1e-3
    assert fingerprint(model) != same
    assert fingerprint(CASES["llava-clip-mistral"].model()) != same


def test_what_cannot_be_loaded_is_a_clean_error(tmp_path):
    with pytest.raises(ModelLoadError, match="--model"):
        load(str(tmp_path))
    with pytest.raises(ModelLoadError, match="cpu, cuda"):
        resolve_device("gpu")


def test_a_package_that_a_processor_wants_is_named(monkeypatch):
    """SmolVLM's spells numbers."""
    monkeypatch.setattr(processing_smolvlm, "num2words", None)
    made = partial(processing_smolvlm.SmolVLMProcessor, None, tokenizer({}), None)
    monkeypatch.setattr(AutoProcessor, "from_pretrained", lambda *_, **__: made())
    with pytest.raises(ModelLoadError, match=r"`pip install num2words`. Install that, or leave"):
        load("embedded")
