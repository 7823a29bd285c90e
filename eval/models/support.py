"""Which model families a method runs on: tried on the sizes of published checkpoints, without
weights."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from ...adapters.patching import patch
from ...prune.errors import VlmpruneError
from ...prune.registry import method_class
from .shapes import SHAPES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HINT = " or use a method that works on it: ", " Methods that work on it: "


def support(name: str) -> dict[str, tuple[str, str | None]]:
    """Model type -> the published sizes that were tried, and why the method refuses them with its
    fields at their defaults, None where it runs. Families without such sizes are left out.

    Whatever else goes wrong in somebody's own method is a reason like any other.
    """
    found: dict[str, tuple[str, str | None]] = {}
    budget: dict[str, Any] = {} if method_class(name).unbudgeted else {"keep_ratio": 0.5}
    for kind, (shape, model) in _models().items():
        reason: str | None = None
        try:
            patch(model, name, **budget).remove()
        except VlmpruneError as error:
            reason = _without_others(str(error))
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
        found[kind] = shape, reason
    return found


@cache
def _models() -> dict[str, tuple[str, PreTrainedModel]]:
    """The first published shape of every family."""
    from transformers import AutoModelForImageTextToText

    models: dict[str, tuple[str, PreTrainedModel]] = {}
    for shape in SHAPES.values():
        config = shape.config()
        if config.model_type not in models:
            with torch.device("meta"):
                model = AutoModelForImageTextToText.from_config(config)
            models[config.model_type] = shape.name, model
    return models


def _without_others(reason: str) -> str:
    """A refusal without the list of methods that would work."""
    for hint in _HINT:
        reason = reason.partition(hint)[0]
    return reason.rstrip(",. ") + "."
