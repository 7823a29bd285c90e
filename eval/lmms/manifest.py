"""What lmms-eval's entry-point group `lmms_eval.models` finds: where our model's class is."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest

NAME = "vlmprune"


def manifests() -> list[ModelManifest]:
    """Names only: nothing heavy is imported until somebody asks for the model."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [ModelManifest(NAME, chat_class_path=f"{__package__}.model.VlmPrune")]
