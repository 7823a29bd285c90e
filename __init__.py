"""vlmprune: token pruning for vision-language models, behind one contract.

    import vlmprune
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.11)
    model.generate(**inputs)          # as before, on a fraction of the visual tokens
    handle.remove()

The names are loaded on first use, so that `import vlmprune` and `vlmprune --help` stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .adapters.clip_text import ClipText
    from .adapters.handle import Handle
    from .adapters.patching import patch, unpatch
    from .adapters.registry import model_names as models
    from .adapters.serving.arguments import vllm_args
    from .eval.checking.check import check_method
    from .eval.compare.comparison import Comparison, compare
    from .prune.errors import (
        BudgetError,
        MethodAnswerError,
        MethodFieldError,
        MissingSignalError,
        NothingToShowError,
        NotRecordedError,
        PluginError,
        UnknownMethodError,
        UnsupportedFeatureError,
        UnsupportedModelError,
        VlmpruneError,
    )
    from .prune.registry import method
    from .prune.registry import method_names as methods

__version__ = "0.1.0"

_HOME = {
    "ClipText": ("adapters.clip_text", "ClipText"),
    "patch": ("adapters.patching", "patch"),
    "unpatch": ("adapters.patching", "unpatch"),
    "Handle": ("adapters.handle", "Handle"),
    "vllm_args": ("adapters.serving.arguments", "vllm_args"),
    "models": ("adapters.registry", "model_names"),
    "check_method": ("eval.checking.check", "check_method"),
    "compare": ("eval.compare.comparison", "compare"),
    "Comparison": ("eval.compare.comparison", "Comparison"),
    "method": ("prune.registry", "method"),
    "methods": ("prune.registry", "method_names"),
    "VlmpruneError": ("prune.errors", "VlmpruneError"),
    "BudgetError": ("prune.errors", "BudgetError"),
    "MethodAnswerError": ("prune.errors", "MethodAnswerError"),
    "MethodFieldError": ("prune.errors", "MethodFieldError"),
    "MissingSignalError": ("prune.errors", "MissingSignalError"),
    "NothingToShowError": ("prune.errors", "NothingToShowError"),
    "NotRecordedError": ("prune.errors", "NotRecordedError"),
    "PluginError": ("prune.errors", "PluginError"),
    "UnknownMethodError": ("prune.errors", "UnknownMethodError"),
    "UnsupportedFeatureError": ("prune.errors", "UnsupportedFeatureError"),
    "UnsupportedModelError": ("prune.errors", "UnsupportedModelError"),
}

__all__ = [
    "BudgetError",
    "ClipText",
    "Comparison",
    "Handle",
    "MethodAnswerError",
    "MethodFieldError",
    "MissingSignalError",
    "NotRecordedError",
    "NothingToShowError",
    "PluginError",
    "UnknownMethodError",
    "UnsupportedFeatureError",
    "UnsupportedModelError",
    "VlmpruneError",
    "__version__",
    "check_method",
    "compare",
    "method",
    "methods",
    "models",
    "patch",
    "unpatch",
    "vllm_args",
]


def __getattr__(name: str) -> object:
    try:
        module, attribute = _HOME[name]
    except KeyError:
        raise AttributeError(f"module 'vlmprune' has no attribute {name!r}") from None
    value = getattr(importlib.import_module(f".{module}", __name__), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
