"""LLaVA-NeXT and LLaVA-OneVision in vLLM answer as the patched models of transformers do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vlmprune
from kit import skips, tiny_llava, tiny_tiled
from kit.vllm import engine, patched, same, served
from transformers import AutoModelForImageTextToText

pytestmark = [skips.needs("vllm"), pytest.mark.slow]

ONE = "w1 <image> w2 w3 w4"
SQUARE, WIDE, TALL = (
    tiny_llava.picture(1),
    tiny_llava.picture(2, 190, 90),
    tiny_llava.picture(3, 100, 150),
)
PROMPTS = [(ONE, {"image": [one]}) for one in (SQUARE, WIDE, TALL)]
NEXT = [*PROMPTS, ("w5 <image> w6 <image> w7", {"image": [WIDE, SQUARE]}), ("w1 w2 w3", {})]
VIDEO = np.stack([np.asarray(tiny_llava.picture(seed, 120, 100)) for seed in range(4, 9)])
ONEVISION = [*NEXT, ("w1 <video> w2 w3", {"video": [VIDEO]})]
ROOM = {"max_model_len": 512, "max_num_batched_tokens": 512}


class Parity:
    """An engine of a checkpoint with a method, and the patched model."""

    def __init__(self, save, processor, folder, **limits):
        save(folder)
        self.room = {**ROOM, "limit_mm_per_prompt": limits}
        self.folder, self.processor = folder, processor()
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()

    def hold(self, prompts, method, fields, *budgets):
        """All budgets in one engine, the first as its own, each also from its caches."""
        args = vlmprune.vllm_args(str(self.folder), method, **fields, **budgets[0])
        llm = engine(self.folder, **self.room, **args)
        for budget in budgets:
            wanted = patched(
                self.model,
                self.processor,
                prompts,
                method,
                positions="repacked",
                **fields,
                **budget,
            )
            for _ in range(2):
                same(served(llm, prompts, mm_processor_kwargs={"vlmprune": budget}), wanted)


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory):
    folder = tmp_path_factory.mktemp("next")
    return Parity(tiny_tiled.save_next, tiny_tiled.next_processor, folder, image=2)


@pytest.fixture(scope="module")
def onevision(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onevision")
    return Parity(
        tiny_tiled.save_onevision, tiny_tiled.onevision_processor, folder, image=2, video=1
    )


QUARTER, SOME, ALL = {"keep_ratio": 0.25}, {"keep_tokens": 40}, {"keep_ratio": 1.0}


@pytest.mark.parametrize(
    ("method", "fields", "budgets"),
    [
        ("divprune", {}, [QUARTER, SOME, ALL]),
        ("visionzip", {}, [SOME]),
    ],
)
def test_llava_next_answers_as_the_patched_model(llava_next, method, fields, budgets):
    llava_next.hold(NEXT, method, fields, *budgets)


@pytest.mark.parametrize(
    ("method", "fields", "budgets"),
    [
        ("divprune", {}, [QUARTER, SOME, ALL]),
        ("cls_topk", {"scores": "received"}, [QUARTER]),
    ],
)
def test_llava_onevision_answers_as_the_patched_model(onevision, method, fields, budgets):
    onevision.hold(ONEVISION, method, fields, *budgets)
