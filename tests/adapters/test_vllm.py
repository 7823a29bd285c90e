"""vLLM with the plugin answers as the patched model of transformers does, token for token."""

from __future__ import annotations

import gc
import os

import pytest
import torch
import vlmprune
from kit import skips, tiny_llava

pytestmark = [skips.needs("vllm"), pytest.mark.slow]

NEW = 8
ONE, TWO = "w1 <image> w2 w3 w4", "w5 <image> w6 <image> w7 w8"
SQUARE, WIDE, TALL = (
    tiny_llava.picture(1),
    tiny_llava.picture(2, 160, 90),
    tiny_llava.picture(3, 90, 160),
)
PROMPTS = [(ONE, [SQUARE]), (ONE, [WIDE]), (TWO, [TALL, SQUARE]), ("w1 w2 w3 w4 w5", [])]
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


def engine(folder, **options):
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import LLM

    gc.collect()  # an engine that is collected later would take the new one's process groups along
    return LLM(
        model=str(folder),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4,
        enforce_eager=True,
        kv_cache_memory_bytes=32 << 20,
        distributed_executor_backend="uni",
        limit_mm_per_prompt={"image": 2},
        **options,
    )


def served(llm, prompts, **request):
    """(tokens, logprob of the first, length of the prompt) of each prompt."""
    from vllm import SamplingParams

    asked = [
        {"prompt": text, **({"multi_modal_data": {"image": images}} if images else {}), **request}
        for text, images in prompts
    ]
    greedy = SamplingParams(temperature=0, max_tokens=NEW, logprobs=1, ignore_eos=True)
    found = []
    for out in llm.generate(asked, greedy, use_tqdm=False):
        (answer,) = out.outputs
        first = answer.logprobs[0][answer.token_ids[0]].logprob
        found.append((list(answer.token_ids), first, len(out.prompt_token_ids)))
    return found


def patched(folder, prompts, method, **fields):
    """The same of the patched model of transformers."""
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = tiny_llava.processor()
    found = []
    with vlmprune.patch(model, method, positions="repacked", **fields) as handle:
        for text, images in prompts:
            inputs = processor(images=images or None, text=text, return_tensors="pt")
            out = model.generate(
                **inputs,
                max_new_tokens=NEW,
                eos_token_id=-1,  # min_new_tokens would forbid the token, which vLLM does not
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            length = inputs["input_ids"].shape[1]
            tokens = out.sequences[0, length:].tolist()
            first = out.logits[0][0].log_softmax(-1)[tokens[0]].item()
            entered = handle.last.tokens_per_layer[0][0] if images else 0  # merged rows among them
            dropped = len(images) * tiny_llava.TOKENS - entered
            found.append((tokens, first, length - dropped))
    return found


def same(found, wanted):
    assert [one[0] for one in found] == [one[0] for one in wanted]
    assert [one[2] for one in found] == [one[2] for one in wanted]
    assert [one[1] for one in found] == pytest.approx([one[1] for one in wanted], abs=1e-3)


@pytest.mark.parametrize("kind", METHODS)
def test_greedy_tokens_first_logprobs_and_lengths_are_those_of_the_patched_model(folder, kind):
    method, fields = METHODS[kind]
    args = vlmprune.vllm_args(str(folder), method, keep_ratio=0.25, **fields)
    llm = engine(folder, **args)
    wanted = patched(folder, PROMPTS, method, keep_ratio=0.25, **fields)
    same(served(llm, PROMPTS), wanted)
    same(served(llm, PROMPTS), wanted)  # from the caches


def test_a_request_has_its_own_budget_and_caches_tell_budgets_apart(folder):
    llm = engine(folder, **vlmprune.vllm_args(str(folder), "divprune", keep_ratio=0.25))
    for words in ({"keep_tokens": 16}, {"keep_ratio": 0.25}, {"keep_ratio": 1.0}):
        found = served(llm, PROMPTS[:3], mm_processor_kwargs={"vlmprune": words})
        same(found, patched(folder, PROMPTS[:3], "divprune", **words))
    with pytest.raises(Exception, match="a request may change the budget alone"):
        served(llm, PROMPTS[:1], mm_processor_kwargs={"vlmprune": {"method": "grid"}})


def test_chunks_of_the_prefill_may_end_inside_an_image(folder):
    args = vlmprune.vllm_args(str(folder), "divprune", keep_tokens=20)
    llm = engine(folder, **args, max_num_batched_tokens=12, enable_chunked_prefill=True)
    same(served(llm, PROMPTS), patched(folder, PROMPTS, "divprune", keep_tokens=20))


def test_without_the_override_the_model_is_vllms_own(folder):
    found = served(engine(folder), PROMPTS[:1])
    same(found, patched(folder, PROMPTS[:1], "divprune", keep_ratio=1.0))
