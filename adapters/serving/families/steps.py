"""What vLLM settles of its configuration for a model of ours: its own rules for that model, and as
many pictures in a step as it would encode of whole ones.

A step of the scheduler encodes pictures as long as their tokens in the prompt fit a budget, which
is the step's in tokens. Of pictures of which a quarter is kept four times as many fit, and all of
their prompts wait for the encoder. The budget is smaller by the same ratio instead, where all
pictures are of one size: what never fits would wait for ever, and a request may keep all of one.
"""

from __future__ import annotations

from typing import Any

from ....prune.errors import VlmpruneError
from ..served import WORD
from ..sizes import served_of

from vllm.model_executor.models.config import (  # isort: skip  (behind the version's check)
    MODELS_CONFIG_MAP,
    VerifyAndUpdateConfig,
)


def settle(architecture: str, theirs: str) -> None:
    """Let vLLM call our rule for an architecture.

    Args:
        theirs: the architecture in vLLM that it is made of.
    """
    rule = MODELS_CONFIG_MAP.get(theirs, VerifyAndUpdateConfig)
    MODELS_CONFIG_MAP[architecture] = type(f"{architecture}Config", (_Steps, rule), {})


class _Steps:
    """In front of vLLM's own rule."""

    @classmethod
    def verify_and_update_config(cls, vllm_config: Any) -> None:
        super().verify_and_update_config(vllm_config)  # type: ignore[misc]
        config = vllm_config.model_config.hf_config
        try:
            served = served_of(config, getattr(config, WORD))
        except VlmpruneError:
            return  # the model refuses it when it is loaded, where the error's class is kept
        if served.one_size:
            scheduler, whole = vllm_config.scheduler_config, served.usual.num_tokens
            fitting = scheduler.max_num_batched_tokens * served.keep(served.usual) // whole
            scheduler.max_num_encoder_input_tokens = max(fitting, whole)
