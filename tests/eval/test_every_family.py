"""What a user does with a model of any family and its processor: questions in a batch, dense and
pruned, with pictures of any size, and the bench."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import vlmprune
from kit import zoo
from kit.words import chat_template
from PIL import Image
from vlmprune.eval.bench.oracle import check_oracle
from vlmprune.eval.bench.rounds import compare
from vlmprune.eval.bench.subject import Subject
from vlmprune.eval.bench.variant import Variant
from vlmprune.eval.measure.evaluate import Evaluator
from vlmprune.eval.models.families.gemma3 import AVERAGING, Averaged, tiny_gemma3
from vlmprune.eval.tasks.questions import chat_prompt
from vlmprune.eval.words.parts import parse


@dataclass(frozen=True)
class Asked:
    question: str
    image: Image.Image
    id: int
    answer: str = "w9"
    kind: str = "any"


class Task:
    name, version, max_new_tokens = "two", "1", 2

    def prompt(self, processor, question):
        return chat_prompt(processor, question.question)

    def is_correct(self, prediction, question):
        return prediction == question.answer


def picture(*size: int) -> Image.Image:
    values = np.random.default_rng(size).integers(0, 255, (*size, 3)).astype(np.uint8)
    return Image.fromarray(values)


@pytest.mark.parametrize("name", zoo.PROCESSORS)
def test_questions_of_a_sweep_are_asked_in_a_batch(name):
    """Each with a picture of its own, the shorter one padded: what `sweep` and `ask` run."""
    family = zoo.PROCESSORS[name]
    processor = family.processor()
    processor.chat_template = chat_template(family.MARKS)
    asked = [Asked("w5 w6", picture(60, 90), 0), Asked("w7", picture(30, 24), 1)]
    evaluator = Evaluator(
        zoo.CASES[name].model(), processor, Task(), asked, batch_size=2, timed_questions=1
    )
    drawn: list[Image.Image] = []
    measured, samples = evaluator.run(
        [part.call for part in parse("divprune@0.5")],
        inspect=lambda handle: drawn.append(handle.overlay(asked[1].image, 1)),
    )
    tokens = measured["tokens"]
    assert tokens["generated"] == 2 and len(samples) == 2
    assert tokens["kept_per_image"] == pytest.approx(0.5 * tokens["in_per_image"], abs=0.5)
    assert 0 < measured["flops"]["prefill_share"] < 1 and measured["kv_bytes"] > 0
    assert measured["flops"]["vision"] > 0  # whatever the processor calls the pixels
    assert drawn


WINDOW = 12
DECODERS = {
    "gemma4": zoo.OF_TESTS["gemma4"].WINDOWED,  # keys of full layers are wider
    "qwen3_5": zoo.CASES["qwen3_5"],  # half of the layers keep a state
    "lfm2_vl": zoo.CASES["lfm2_vl"],
    "gemma3": zoo.Case("gemma3-windows", lambda: tiny_gemma3(WINDOW), AVERAGING, Averaged()),
}


@dataclass(frozen=True, kw_only=True)
class Tiny(Subject):
    """A tiny model with the bench's own words and pictures."""

    case: zoo.Case

    def config(self):
        return self.case.config()


@pytest.mark.parametrize("case", DECODERS.values(), ids=DECODERS)
def test_the_bench_beside_its_oracle_on_decoders_of_several_kinds_of_layers(case):
    """Padded, so that layers need the masks of their kind; from sizes alone it is the same."""
    side = 24 if case.name in ("lfm2_vl", "gemma3-windows") else 32
    how = {"picture": (side, side), "batch_size": 2, "ragged": True}
    subject = Tiny(case=case, attn_implementation="eager", **how)
    variants = [Variant(()), Variant(parse("fastv:layer=2@0.5"))]
    model, inputs = subject.model("cpu"), subject.inputs("cpu")
    for number in range(2):
        compare(model, inputs, variants, 2, number)
    for variant in variants:
        reckoned = Variant(variant.parts)
        reckoned.reckon(subject)
        assert variant.cache_bytes == reckoned.cache_bytes
        assert variant.entries == reckoned.entries
    dense, fastv = variants
    assert fastv.rounds[0].oracle is not None and fastv.cache_bytes < dense.cache_bytes
    kinds = case.config().get_text_config().layer_types
    stored = {"full_attention": max(dense.entries), "sliding_attention": WINDOW - 1}
    assert dense.entries == [stored.get(kind, 0) for kind in kinds]


def test_decoders_whose_layers_cannot_run_in_groups_are_refused():
    of_tests = zoo.OF_TESTS["gemma4"]
    check_oracle(of_tests.EXPERTS.reference())
    with pytest.raises(vlmprune.UnsupportedModelError, match="give --meta"):
        check_oracle(of_tests.SHARING.reference())
