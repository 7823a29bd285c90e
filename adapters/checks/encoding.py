"""What cannot be combined with rows that leave in the vision encoder, refused when it runs."""

from __future__ import annotations

from typing import Any, NoReturn

from ...prune.contract import InEncoder
from ...prune.errors import UnsupportedFeatureError
from ..family import Call, Family


def refuse_encoder(family: Family, call: Call, method: InEncoder) -> None:
    """Refuse a pass of the encoder in which a method cannot remove rows.

    Raises:
        UnsupportedFeatureError: the projector is to read other layers than the model's own, or
            blocks would run a second time.
    """
    tower: Any = family.vision_tower
    if len(family.unread_layers(call.inputs)) != len(family.unread_layers({})):
        raise UnsupportedFeatureError(
            f"vision_feature_layer={call.inputs.get('vision_feature_layer')} reads another layer "
            f"of the vision encoder than {method.name} was planned for: set it in model.config "
            f"before vlmprune.patch."
        )
    blocks = family.encoder.blocks if family.encoder is not None else ()
    if tower.training and any(getattr(b.module, "gradient_checkpointing", False) for b in blocks):
        raise UnsupportedFeatureError(
            f"{method.name} removes rows inside the vision encoder, which cannot be combined with "
            f"gradient checkpointing of it, where blocks run a second time: call "
            f"model.activation_checkpointing_disable() or model.eval(), or use a method that acts "
            f"before the LLM."
        )


def refuse_tuple(method: InEncoder) -> NoReturn:
    """Refuse a plain tuple for what a shortened encoder gives.

    Raises:
        UnsupportedFeatureError: it cannot say which tokens are left; the others would be zeros.
    """
    raise UnsupportedFeatureError(
        f"return_dict=False gives a plain tuple, which cannot say which tokens {method.name} left "
        f"inside the vision encoder: leave it out."
    )
