"""The way in: what to give to `vllm serve` or `vllm.LLM`. Nothing of vLLM is imported."""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...prune.errors import MethodFieldError, UnsupportedModelError
from .served import WORD
from .sizes import served_of

ARCHITECTURES: Mapping[str, str] = {
    "llava": "VlmPruneLlavaForConditionalGeneration",
    "llava_next": "VlmPruneLlavaNextForConditionalGeneration",
    "llava_onevision": "VlmPruneLlavaOnevisionForConditionalGeneration",
    "internvl": "VlmPruneInternVLForConditionalGeneration",
    "qwen2_vl": "VlmPruneQwen2VLForConditionalGeneration",
    "qwen2_5_vl": "VlmPruneQwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "VlmPruneQwen3VLForConditionalGeneration",
    "qwen3_5": "VlmPruneQwen3_5ForConditionalGeneration",
}
"""Served families by `model_type`, which is also the file's name, and the class in it."""

REFUSED: Mapping[str, str] = {
    "gemma3": "the tokens of an image see each other both ways, which vLLM's CPU build, the only "
    "one that this was tried with, does not compute: there its own Gemma 3 answers unlike "
    "transformers' before anything is pruned",
}
"""Families that vLLM has and that were tried, and why they are not served."""


def vllm_args(model: str, method: str, **fields_and_budget: object) -> dict[str, object]:
    """Keywords for `vllm.LLM(model=model, ...)`; `hf_overrides` is also a flag of `vllm serve`.

    Args:
        model: a folder or a name on the Hub, of which the configuration alone is read.
        method: one that acts before the LLM.
        **fields_and_budget: as for `vlmprune.method`.

    Raises:
        UnsupportedModelError: another family.
        UnsupportedFeatureError, MissingSignalError, MethodFieldError, BudgetError: the method
            cannot be served on this model.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model)
    if config.model_type not in ARCHITECTURES:
        why = f", as {reason}" if (reason := REFUSED.get(config.model_type)) else " yet"
        raise UnsupportedModelError(
            f"{model} is a {config.model_type!r}, which is not served by vLLM with vlmprune{why}: "
            f"use one of {', '.join(ARCHITECTURES)}, or vlmprune.patch for the model in "
            f"transformers."
        )
    options = {"method": method, **fields_and_budget}
    try:
        json.dumps(options)
    except TypeError:
        raise MethodFieldError(
            f"{options!r} must be plain words and numbers, as vLLM hands them to its processes."
        ) from None
    served_of(config, options)
    return {"hf_overrides": {"architectures": [ARCHITECTURES[config.model_type]], WORD: options}}
