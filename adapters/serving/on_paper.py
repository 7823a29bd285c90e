"""The family of a served model as `patch` knows it, without weights: sizes, and how images lie."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ..family import Family
from ..registry import family_of

_KNOWN: dict[str, Family] = {}


def on_paper(config: Any) -> Family:
    """The family of the model of this configuration, whose tensors are on the device `meta`.

    What it says of sizes, and what it packs or averages by sizes, is right; nothing can be encoded.

    Raises:
        UnsupportedModelError: a variant that cannot be pruned.
    """
    key = config.to_json_string()
    if key not in _KNOWN:
        from transformers import AutoModelForImageTextToText

        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(copy.deepcopy(config))
        _KNOWN[key] = family_of(model)
    return _KNOWN[key]
