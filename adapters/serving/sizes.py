"""Sizes of a served LLaVA-1.5, read from its configuration alone."""

from __future__ import annotations

from typing import Any

from ...prune.contract import Decoder, ModelShape, Tower
from ...prune.errors import UnsupportedModelError
from ...prune.tiling import Tiling
from .served import Options, Served

_TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""The towers, and the `vision_feature_select_strategy` that leaves their patches alone."""


def served_of(config: Any, options: Options) -> Served:
    """The method of `options` on the model of this configuration.

    Raises:
        UnsupportedModelError: a variant that is not served; else as `Served.of`.
    """
    vision, text = config.vision_config, config.text_config
    kind, layer = vision.model_type, config.vision_feature_layer
    strategy = config.vision_feature_select_strategy
    if kind not in _TOWERS or _TOWERS[kind] != strategy or not isinstance(layer, int):
        raise UnsupportedModelError(
            f"A LLaVA with a {kind!r} tower, vision_feature_layer={layer!r} and "
            f"vision_feature_select_strategy={strategy!r} is not served: use one layer (an int) "
            f"of a tower and its strategy among {_TOWERS}."
        )
    has_cls = kind == "clip_vision_model"
    tower = Tower(
        num_layers=vision.num_hidden_layers,
        has_cls=has_cls,
        text_twin=has_cls,
        prefix=int(has_cls),
        blocks_read=layer if layer >= 0 else vision.num_hidden_layers + layer + 1,
    )
    decoder = Decoder(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
    )
    side = vision.image_size // vision.patch_size
    shape = ModelShape(tower=tower, decoder=decoder)
    return Served.of(options, shape, Tiling.single(side, side))
