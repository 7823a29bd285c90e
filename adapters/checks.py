"""Features of generate() that cannot be combined with pruning, refused at the call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..prune.errors import UnsupportedFeatureError


def check_generate(model: nn.Module, kwargs: Mapping[str, Any], *, inside_the_llm: bool) -> None:
    """Refuse what would give wrong results.

    Args:
        inside_the_llm: a method acts in the decoder or on its cache.

    Raises:
        UnsupportedFeatureError: with the option and what to do instead.
    """
    config = kwargs.get("generation_config") or getattr(model, "generation_config", None)

    def option(name: str) -> Any:
        value = kwargs.get(name)
        return value if value is not None else getattr(config, name, None)

    if option("prefill_chunk_size") is not None:
        raise UnsupportedFeatureError(
            f"prefill_chunk_size={option('prefill_chunk_size')} splits the prompt, and a method "
            f"would see only a part of the image: leave it out (a pruned prompt is short)."
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and getattr(mask, "ndim", None) != 2:
        raise UnsupportedFeatureError(
            "A custom attention mask that is not 2-D cannot be shortened with the visual tokens: "
            "pass the (B, L) padding mask of the processor, or unpatch the model."
        )
    if not inside_the_llm:
        return
    if kwargs.get("assistant_model") is not None or option("prompt_lookup_num_tokens") is not None:
        raise UnsupportedFeatureError(
            "Assisted decoding feeds draft tokens together with the prompt, and a method inside "
            "the decoder or on its cache would choose by the drafts instead of the question: leave "
            "out assistant_model / prompt_lookup_num_tokens, or use a method that acts before the "
            "LLM."
        )
