"""InternVL in vLLM answers as the patched model of transformers does."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vlmprune
from kit import skips, tiny_internvl, tiny_llava
from kit.vllm import engine, patched, same, served
from transformers import AutoModelForImageTextToText

pytestmark = [skips.needs("vllm"), pytest.mark.slow]

MARK = "<IMG_CONTEXT>"
SQUARE, WIDE, TALL = (
    tiny_llava.picture(1, 24, 24),
    tiny_llava.picture(2, 72, 24),
    tiny_llava.picture(3, 24, 48),
)
VIDEO = np.stack([np.asarray(tiny_llava.picture(seed, 24, 24)) for seed in range(4, 7)])
ONE = [(f"w10 {MARK} w20 w30 w40", {"image": [one]}) for one in (SQUARE, WIDE, TALL)]
PROMPTS = [
    *ONE,
    (f"w50 {MARK} w60 {MARK} w70", {"image": [WIDE, SQUARE]}),
    ("w10 w20 w30 w40 w50", {}),
    ("w10 <video> w20 w30", {"video": [VIDEO]}),
]
QUARTER, SOME, ALL = {"keep_ratio": 0.25}, {"keep_tokens": 7}, {"keep_ratio": 1.0}
ROOM = {
    "max_model_len": 512,
    "max_num_batched_tokens": 12,  # chunks end inside images
    "limit_mm_per_prompt": {"image": 2, "video": 1},
}
METHODS = {
    "features": ("divprune", {}, PROMPTS, [QUARTER, SOME, ALL]),
    "merging": ("visionzip", {}, PROMPTS, [QUARTER]),
    "question": ("cdpruner", {"relevance": "prompt"}, PROMPTS[:-1], [SOME]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("internvl")
    tiny_internvl.save(path)
    return path


@pytest.mark.parametrize("kind", METHODS)
def test_internvl_answers_as_the_patched_model(folder, kind):
    """Tiles and a thumbnail, frames with text between them; all budgets in one engine, each also
    from its caches."""
    method, fields, prompts, budgets = METHODS[kind]
    args = vlmprune.vllm_args(str(folder), method, **fields, **budgets[0])
    llm = engine(folder, **ROOM, **args)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = tiny_internvl.processor()
    for budget in budgets:
        words = {"positions": "repacked", **fields, **budget}
        wanted = patched(model, processor, prompts, method, **words)
        for _ in range(2):
            same(served(llm, prompts, mm_processor_kwargs={"vlmprune": budget}), wanted)
    if kind == "question":
        with pytest.raises(Exception, match="video"):
            served(llm, PROMPTS[-1:])
