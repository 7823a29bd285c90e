"""What tests of the plugin ask of vLLM and of the patched model: the same words of both."""

from __future__ import annotations

import gc
import os
from typing import Any

import pytest
import vlmprune
from transformers.video_utils import VideoMetadata

NEW = 8
Prompt = tuple[str, dict[str, list[Any]]]
"""Text with placeholders, and for them, if any, `image`s and `video`s, which are frames and what is
known of them."""
Answer = tuple[list[int], float, int]
"""Tokens, logprob of the first, length of the prompt with kept tokens."""


def engine(folder: Any, **options: Any) -> Any:
    """vLLM in this process, a new one."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    from vllm import LLM

    gc.collect()  # an engine that is collected later would take the new one's process groups along
    words = {
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 4,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 32 << 20,
        "distributed_executor_backend": "uni",
        "limit_mm_per_prompt": {"image": 2},
    }
    return LLM(model=str(folder), **(words | options))


def served(llm: Any, prompts: list[Prompt], **request: Any) -> list[Answer]:
    from vllm import SamplingParams

    asked = [
        {"prompt": text, **({"multi_modal_data": media} if media else {}), **request}
        for text, media in prompts
    ]
    greedy = SamplingParams(temperature=0, max_tokens=NEW, logprobs=1, ignore_eos=True)
    found = []
    for out in llm.generate(asked, greedy, use_tqdm=False):
        (answer,) = out.outputs
        first = answer.logprobs[0][answer.token_ids[0]].logprob
        found.append((list(answer.token_ids), first, len(out.prompt_token_ids)))
    return found


def patched(
    model: Any, processor: Any, prompts: list[Prompt], method: str, **options: Any
) -> list[Answer]:
    """The same of a model of transformers; `options`: of `patch`."""
    found = []
    with vlmprune.patch(model, method, **options) as handle:
        for text, media in prompts:
            inputs = processor(text=text, **_given(media), return_tensors="pt")
            out = model.generate(
                **inputs,
                max_new_tokens=NEW,
                eos_token_id=-1,  # min_new_tokens would forbid the token, which vLLM does not
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
            ids = inputs["input_ids"]
            tokens = out.sequences[0, ids.shape[1] :].tolist()
            first = out.logits[0][0].log_softmax(-1)[tokens[0]].item()
            visual = sum(int((ids == one).sum()) for one in _placeholders(model.config))
            entered = handle.last.tokens_per_layer[0][0] if media else 0  # merged rows among them
            found.append((tokens, first, ids.shape[1] - visual + entered))
    return found


def near(found: list[Answer], wanted: list[Answer]) -> None:
    """Of a kernel that has bfloat16 alone: the first token, as the next ones may be of a tie."""
    assert [one[0][0] for one in found] == [one[0][0] for one in wanted]
    assert [one[2] for one in found] == [one[2] for one in wanted]
    assert [one[1] for one in found] == pytest.approx([one[1] for one in wanted], abs=0.1)


def same(found: list[Answer], wanted: list[Answer]) -> None:
    assert [one[0] for one in found] == [one[0] for one in wanted]
    assert [one[2] for one in found] == [one[2] for one in wanted]
    assert [one[1] for one in found] == pytest.approx([one[1] for one in wanted], abs=1e-3)


def _given(media: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """In the words of processors of transformers."""
    given = {f"{kind}s": list(items) for kind, items in media.items()}
    pairs = [one for one in given.get("videos", []) if isinstance(one, tuple)]
    if pairs:
        given["videos"] = [frames for frames, _ in pairs]
        given["video_metadata"] = [VideoMetadata(**about) for _, about in pairs]
    return given


def _placeholders(config: Any) -> set[int]:
    names = ("image_token_id", "image_token_index", "video_token_id")
    return {found for name in names if (found := getattr(config, name, None)) is not None}
