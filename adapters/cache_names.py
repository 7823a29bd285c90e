"""What `transformers` calls a cache: `cache` from 5.24 on, `past_key_values` before."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from transformers.masking_utils import create_causal_mask

_OLD = "past_key_values"
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else _OLD
"""The argument and the field of outputs that hold it."""


def cache_given(kwargs: Mapping[str, Any]) -> Any:
    """The cache among a caller's arguments, who may use the older word for as long as
    `transformers` takes it; None where there is none."""
    return kwargs.get(CACHE) if CACHE in kwargs else kwargs.get(_OLD)


def cache_of(output: Any) -> Any:
    """The cache of what a model returned."""
    return getattr(output, CACHE)
