"""Models that accelerate has spread over memory and disk: the same answers, and the same model
once the patch is off. Weights of such a model are on the meta device but for the moment of use."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from accelerate import cpu_offload
from kit import zoo
from kit.snapshots import snapshot
from kit.spread import METHODS, ROWS, STEPS, changed, to_disk, works_on
from transformers import AutoModelForImageTextToText
from vlmprune.eval.embedded.task import EmbeddedTask
from vlmprune.eval.measure.evaluate import Evaluator
from vlmprune.eval.models.loading import ModelLoadError, fingerprint, load, resolve_device


def to_memory(model, folder):
    """Everything waits in memory, one module at a time is put together.

    But for parameters of the core itself, which generate() uses outside of any `forward`.
    """
    for part in (*model.model.children(), model.lm_head):
        cpu_offload(part, execution_device=torch.device("cpu"))
    return model


OFFLOADS = pytest.mark.parametrize(
    ("case", "offload"),
    [pytest.param(zoo.CASES[name], to_disk, id=f"{name}-disk") for name in zoo.FAMILY_NAMES]
    + [
        pytest.param(zoo.CASES[name], to_memory, id=f"{name}-memory")
        for name in ("llava_next", "qwen2_5_vl")
    ],
)


def kinds_of(case: zoo.Case, offload) -> list[str]:
    """Every kind of reading on the first family; on others what acts everywhere, and three more by
    turns."""
    if case.name == zoo.FAMILY_NAMES[0]:
        return list(METHODS)
    at = 2 * list(zoo.FAMILY_NAMES).index(case.name) + (offload is to_memory)
    return [*list(METHODS)[at::5], "everywhere"]


def generate(model, case: zoo.Case):
    with torch.no_grad():
        return model.generate(**case.inputs(ROWS), max_new_tokens=STEPS, do_sample=False)


@pytest.mark.filterwarnings("ignore:The following device_map keys")  # a parameter is no module
@OFFLOADS
def test_patched_models_answer_as_they_do_in_memory(case, offload, tmp_path):
    model = case.model()
    expected = {"dense": generate(model, case)}
    for name in dict.fromkeys(kinds_of(case, offload)):
        if works_on(case, METHODS[name]):
            with vlmprune.patch(model, METHODS[name]) as handle:
                expected[name] = generate(model, case), handle.last.kept
    offloaded = offload(case.model(), tmp_path)
    assert any(weight.is_meta for weight in offloaded.parameters())
    assert fingerprint(offloaded) == fingerprint(model)
    assert torch.equal(generate(offloaded, case), expected.pop("dense"))
    before = snapshot(offloaded)
    for name, (tokens, kept) in expected.items():
        with vlmprune.patch(offloaded, METHODS[name]) as handle:
            assert torch.equal(generate(offloaded, case), tokens), name
            for one, other in zip(handle.last.kept, kept, strict=True):
                assert torch.equal(one, other), name
        assert not changed(before, snapshot(offloaded)), name


# --- loading -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_disk():
    return load("embedded", device_map={"": "disk"})


def test_models_are_loaded_as_a_device_map_says(on_disk):
    model, processor = on_disk
    assert all(weight.is_meta for weight in model.parameters())
    assert fingerprint(model) == fingerprint(load("embedded")[0])
    questions = EmbeddedTask().questions(2)
    evaluator = Evaluator(
        model, processor, EmbeddedTask(), questions, batch_size=2, timed_questions=1
    )
    assert evaluator.device == torch.device("cpu")
    measured, _ = evaluator.run([vlmprune.method("fastv", keep_ratio=0.3)])
    assert measured["flops"]["visual_share"] < 0.6
    assert measured["times"]["first_token"]["median"] > 0


def test_device_auto_is_a_device_map(monkeypatch):
    assert resolve_device("auto", may_shard=True) == "auto"
    with pytest.raises(ModelLoadError, match="write cpu"):
        resolve_device("auto")
    asked = {}

    def from_pretrained(*args, **kwargs):
        asked.update(kwargs)
        return original(*args, **kwargs)

    original = AutoModelForImageTextToText.from_pretrained
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", from_pretrained)
    load("embedded", device="auto", revision="main")
    assert asked["device_map"] == "auto" and asked["revision"] == "main"


def test_processors_take_arguments_of_their_own():
    _, processor = load("embedded", processor_args={"padding_side": "left"})
    assert processor.tokenizer.padding_side == "left"


def test_a_model_without_weights_has_no_fingerprint():
    with pytest.raises(ModelLoadError, match="nothing says where"):
        fingerprint(zoo.CASES["llava-clip-llama"].model().to("meta"))
