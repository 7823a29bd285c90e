"""vLLM with the plugin answers as the patched model of transformers does, token for token."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import skips, tiny_llava
from kit.vllm import engine, patched, same, served
from transformers import LlavaForConditionalGeneration

pytestmark = [skips.needs("vllm"), pytest.mark.slow]

ONE, TWO = "w1 <image> w2 w3 w4", "w5 <image> w6 <image> w7 w8"
SQUARE, WIDE, TALL = (
    tiny_llava.picture(1),
    tiny_llava.picture(2, 160, 90),
    tiny_llava.picture(3, 90, 160),
)
PROMPTS = [
    (ONE, {"image": [SQUARE]}),
    (ONE, {"image": [WIDE]}),
    (TWO, {"image": [TALL, SQUARE]}),
    ("w1 w2 w3 w4 w5", {}),
]
METHODS = {
    "features": ("divprune", {}),
    "cls": ("vtc_cls", {}),
    "received": ("cls_topk", {"scores": "received"}),
    "merging": ("visionzip", {}),
    "nothing": ("grid", {}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny_llava")
    tiny_llava.save(path)
    return path


def repacked(folder, prompts, method, **options):
    """What the patched model answers with the positions that vLLM gives."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = tiny_llava.processor()
    return patched(model, processor, prompts, method, positions="repacked", **options)


@pytest.mark.parametrize("kind", METHODS)
def test_greedy_tokens_first_logprobs_and_lengths_are_those_of_the_patched_model(folder, kind):
    method, fields = METHODS[kind]
    args = vlmprune.vllm_args(str(folder), method, keep_ratio=0.25, **fields)
    llm = engine(folder, **args)
    wanted = repacked(folder, PROMPTS, method, keep_ratio=0.25, **fields)
    same(served(llm, PROMPTS), wanted)
    same(served(llm, PROMPTS), wanted)  # from the caches


def test_a_siglip_tower_is_read_as_well(tmp_path):
    config = tiny_llava.siglip_config()
    tiny_llava.save(tmp_path, config)
    fields = {"scores": "received", "keep_ratio": 0.25}
    llm = engine(tmp_path, **vlmprune.vllm_args(str(tmp_path), "cls_topk", **fields))
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    processor = tiny_llava.processor(config)
    wanted = patched(model, processor, PROMPTS, "cls_topk", positions="repacked", **fields)
    same(served(llm, PROMPTS), wanted)


def test_a_request_has_its_own_budget_and_caches_tell_budgets_apart(folder):
    llm = engine(folder, **vlmprune.vllm_args(str(folder), "divprune", keep_ratio=0.25))
    settled = llm.llm_engine.vllm_config.scheduler_config  # as many pictures as of whole ones
    assert settled.max_num_encoder_input_tokens == settled.max_num_batched_tokens // 4
    for words in ({"keep_tokens": 16}, {"keep_ratio": 0.25}, {"keep_ratio": 1.0}):
        found = served(llm, PROMPTS[:3], mm_processor_kwargs={"vlmprune": words})
        same(found, repacked(folder, PROMPTS[:3], "divprune", **words))
    with pytest.raises(Exception, match="a request may change the budget alone"):
        served(llm, PROMPTS[:1], mm_processor_kwargs={"vlmprune": {"method": "grid"}})


def test_chunks_of_the_prefill_may_end_inside_an_image(folder):
    args = vlmprune.vllm_args(str(folder), "divprune", keep_tokens=20)
    llm = engine(folder, **args, max_num_batched_tokens=12, enable_chunked_prefill=True)
    same(served(llm, PROMPTS), repacked(folder, PROMPTS, "divprune", keep_tokens=20))


def test_without_the_override_the_model_is_vllms_own(folder):
    found = served(engine(folder), PROMPTS[:1])
    same(found, repacked(folder, PROMPTS[:1], "divprune", keep_ratio=1.0))
