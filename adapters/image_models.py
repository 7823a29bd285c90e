"""Which image encoders can be patched without an LLM, found by class name and module."""

from __future__ import annotations

from typing import Any

from .encoders.clip import ClipModel
from .encoders.dinov2 import Dinov2
from .encoders.timm_eva import TimmEva
from .encoders.timm_vit import TimmVit
from .encoders.vit import Vit
from .image_model import ImageModel

_KINDS: tuple[type[ImageModel], ...] = (ClipModel, Dinov2, Vit, TimmVit, TimmEva)


def image_model_of(model: Any) -> ImageModel | None:
    """A loaded image encoder, bound to what is known of its class; None: it is of none."""
    for own in type(model).__mro__:
        for kind in _KINDS:
            if own.__name__ in kind.classes and own.__module__.startswith(kind.library):
                return kind(model, own.__name__)
    return None


def image_model_names() -> list[str]:
    """The classes that can be patched."""
    return sorted(name for kind in _KINDS for name in kind.classes)
