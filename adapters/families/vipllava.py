"""ViP-LLaVA: LLaVA whose projector reads five layers of CLIP side by side, behind a norm."""

from __future__ import annotations

from ...prune.errors import UnsupportedModelError
from .llava import Llava


class VipLlava(Llava):
    name = "vipllava"
    since = "5.23"  # which calls the layers that are read as LLaVA does

    def check(self) -> None:
        """Towers without a CLS row: the model drops the first row, whatever that is."""
        if not self.tower.has_cls:
            kind = self.vision_tower.config.model_type
            raise UnsupportedModelError(
                f"{type(self.model).__name__} drops the first row of its vision tower, and a "
                f"{kind!r} has a patch there: use a clip_vision_model."
            )
