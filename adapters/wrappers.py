"""What a model may be wrapped in: adapters, processes, compiled code, pipelines."""

from __future__ import annotations

import sys
from typing import Any

from ..prune.errors import UnsupportedModelError

_WRAPPERS = (
    ("transformers.pipelines.base", "Pipeline", "model"),
    (
        "transformers.models.timm_wrapper.modeling_timm_wrapper",
        "TimmWrapperPreTrainedModel",
        "timm_model",
    ),
    ("peft", "PeftModel", "base_model"),
    ("peft", "PeftMixedModel", "base_model"),
    ("peft.tuners.tuners_utils", "BaseTuner", "model"),
    ("torch.nn", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "module"),
    ("torch._dynamo", "OptimizedModule", "_orig_mod"),
)
"""Where a class is defined, its name, and the attribute that holds what it wraps. Nothing is
imported for them: there is no object of a class whose module is not loaded."""


def unwrapped(model: Any) -> Any:
    """The model that a wrapper, or several around each other, run in the end; hooks on it serve
    them too. A model without a wrapper is itself."""
    while (attribute := _wraps(model)) is not None:
        model = getattr(model, attribute)
    return model


def patchable(model: Any) -> Any:
    """As `unwrapped`, for wrappers whose calls then run pruned.

    Raises:
        UnsupportedModelError: code that is compiled, or replicas on several devices; it says what
            to pass instead.
    """
    path = "model"
    while (attribute := _wraps(model)) is not None:
        inner = f"{path}.{attribute}"
        if attribute == "_orig_mod":
            raise UnsupportedModelError(
                f"{path} is compiled already, and compiled code would ignore the hooks: patch the "
                f"freshly loaded model first, then compile it. Or call torch._dynamo.reset(), "
                f"vlmprune.patch({inner}, ...) and torch.compile({inner}) again."
            )
        if len(getattr(model, "device_ids", None) or ()) > 1:
            raise UnsupportedModelError(
                f"{path} copies the model to {len(model.device_ids)} devices at every call, and "
                f"the hooks belong to one: use DistributedDataParallel, or "
                f"vlmprune.patch({inner}, ...) and call {inner}."
            )
        model, path = getattr(model, attribute), inner
    return model


def _wraps(model: Any) -> str | None:
    """The attribute of a wrapper that holds what it wraps; None for everything else."""
    for module, name, attribute in _WRAPPERS:
        kind = getattr(sys.modules.get(module), name, None)
        if kind is not None and isinstance(model, kind):
            return attribute
    return None
