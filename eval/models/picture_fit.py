"""How a processor brings pictures to the model."""

from __future__ import annotations

from typing import Any

from ...adapters.family import Fit


def picture_fit(processor: Any) -> Fit | None:
    """`stretch` where the processor itself says that it cuts nothing away; None: as the processors
    of the model's family do."""
    images = getattr(processor, "image_processor", None)
    return "stretch" if getattr(images, "do_center_crop", None) is False else None
