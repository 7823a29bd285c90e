"""The embedded tower as an image classifier: CLS behind its last block, and a linear head.

The head is `head.safetensors`, which `python -m vlmprune.eval.embedded.training head` trains;
the tower is that of the embedded model, frozen.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import load_model
from .vocabulary import NOUNS

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPVisionModelWithProjection

HEAD = Path(__file__).parent / "head.safetensors"


def load_classifying(
    head: Tensor | None = None,
) -> tuple[CLIPVisionModelWithProjection, Any, dict[str, int]]:
    """The classifier, whose `image_embeds` are logits; its image processor; its classes.

    Args:
        head: (classes, width) in place of the stored one.
    """
    from safetensors.torch import load_file
    from transformers import CLIPVisionModelWithProjection

    embedded, processor = load_model()
    tower = embedded.model.vision_tower
    config = tower.config
    config.projection_dim = len(NOUNS)
    model = CLIPVisionModelWithProjection._from_config(
        config, attn_implementation=config._attn_implementation
    )
    model.vision_model.load_state_dict(tower.state_dict())
    weight = load_file(HEAD)["weight"] if head is None else head
    model.visual_projection.load_state_dict({"weight": weight})
    labels = {name: number for number, name in enumerate(NOUNS)}
    return model.eval(), processor.image_processor, labels
