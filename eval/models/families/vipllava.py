"""ViP-LLaVA: LLaVA-1.5 whose projector reads five layers of CLIP-L/336."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import CLIPVisionConfig, LlamaConfig, VipLlavaConfig

from ..family import EvalFamily, Shape
from ..tiny_layouts import DECODER, IMAGE, TOWER
from ..tiny_models import Case, tiny_shape
from .llava import Llava, clip, image_token, llama

_LAYERS = [-2, -5, -8, -11, 6]


def _vipllava(vision: Any, text: Any, layers: list[int] = _LAYERS) -> VipLlavaConfig:
    return VipLlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token(text.vocab_size),
        vision_feature_layer=layers,
    )


def _tiny() -> VipLlavaConfig:
    return VipLlavaConfig(
        vision_config=CLIPVisionConfig(**TOWER),
        text_config=LlamaConfig(**DECODER, num_key_value_heads=4),
        image_token_index=IMAGE,
        vision_feature_layer=[-2, -4, 1],
    )


class VipLlava(EvalFamily):
    line = "LLaVA"
    wrapper = "llava_hf"
    shapes: ClassVar[tuple[Shape, ...]] = (
        Shape("vip-llava-7b", lambda: _vipllava(clip(), llama()), (336, 336)),
    )
    tiny: ClassVar[tuple[Case, ...]] = (
        Case("vipllava", _tiny, tiny_shape(has_cls=True, prefix=1, blocks_read=4)),
    )
    usual_picture, pixels, smaller = Llava.usual_picture, Llava.pixels, Llava.smaller
