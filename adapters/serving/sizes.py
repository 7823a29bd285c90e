"""Sizes of served models by `model_type`, read from their configurations alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ...prune.contract import Decoder, ModelShape, Tower
from ...prune.errors import UnsupportedModelError
from ...prune.tiling import Tiling
from ..family import IMAGE
from .on_paper import on_paper
from .served import Options, Served

Sizes = tuple[ModelShape, Tiling, bool]
"""Those of the model, how the tokens of a usual picture lie, and whether those of every one do."""

_TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}
"""The towers, and the `vision_feature_select_strategy` that leaves their patches alone."""


def served_of(config: Any, options: Options) -> Served:
    """The method of `options` on the model of this configuration.

    Raises:
        UnsupportedModelError: a variant that is not served; else as `Served.of`.
    """
    return Served.of(options, *SIZES[config.model_type](config))


def _llava(config: Any) -> Sizes:
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
    side = vision.image_size // vision.patch_size
    return ModelShape(tower=tower, decoder=_decoder(text)), Tiling.single(side, side), True


def _packed(config: Any) -> Sizes:
    """An encoder of patches of all pictures in one row, merged behind its last block."""
    vision = config.vision_config
    full = getattr(vision, "fullatt_block_indexes", None)
    tower = Tower(
        num_layers=vision.depth,
        has_cls=False,
        merge_unit=vision.spatial_merge_size**2,
        rotary=True,
        full_attention=None if full is None else tuple(sorted(full)),
    )
    shape = ModelShape(tower=tower, decoder=_decoder(config.get_text_config()))
    return shape, Tiling.single(36, 36), False


def _tiled(config: Any) -> Sizes:
    """Tiles of a picture, as the family knows them; one tile's size is as usual as any other."""
    if not isinstance(config.vision_feature_layer, int):
        raise UnsupportedModelError(
            f"A {config.model_type} with vision_feature_layer={config.vision_feature_layer!r} is "
            f"not served: use one layer (an int)."
        )
    family, side = on_paper(config), config.vision_config.image_size
    call = family.call(IMAGE, {"image_sizes": torch.tensor([[side, side]])})
    return family.shape, family.tilings(call, ())[0], False


def _shuffled(config: Any) -> Sizes:
    """Square tiles of one size, whose patches are shuffled into tokens; one tile is usual."""
    if config.vision_feature_layer != -1:
        raise UnsupportedModelError(
            f"An InternVL with vision_feature_layer={config.vision_feature_layer!r} is not served, "
            f"as vLLM reads the last layer whatever it says: use one with -1."
        )
    family = on_paper(config)
    pixels = torch.empty(1, 3, *config.vision_config.image_size, device="meta")
    (usual,) = family.tilings(family.call(IMAGE, {IMAGE.pixels: pixels}), ())
    return family.shape, usual, False


def _decoder(text: Any) -> Decoder:
    return Decoder(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
    )


SIZES: Mapping[str, Callable[[Any], Sizes]] = {
    "llava": _llava,
    "llava_next": _tiled,
    "llava_onevision": _tiled,
    "internvl": _shuffled,
    "qwen2_vl": _packed,
    "qwen2_5_vl": _packed,
    "qwen3_vl": _packed,
    "qwen3_5": _packed,
}
