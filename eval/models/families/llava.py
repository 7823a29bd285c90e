"""LLaVA-1.5: one square picture, CLIP-L/336 and Vicuna."""

from __future__ import annotations

from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from ....prune.errors import MethodFieldError
from ..family import EvalFamilyBySizes, Pixels, Shape, noise
from ..smaller import Count, Smaller, smaller_square
from ..tiny_layouts import DECODER, IMAGE, TOWER
from ..tiny_models import Case, tiny_shape


def clip(width: int = 1024, layers: int = 24, side: int = 336) -> CLIPVisionConfig:
    """CLIP-L/336 at its defaults."""
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        image_size=side,
        patch_size=14,
    )


def llama(width: int = 4096, mlp: int = 11008, layers: int = 32, vocabulary: int = 32064) -> Any:
    """Vicuna-7B at its defaults."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=4096,
    )


def image_token(vocabulary: int) -> int:
    """Vicuna's first new word; a vocabulary without new words lends one."""
    return 32000 if vocabulary > 32000 else 5


def _llava(vision: Any, text: Any) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=image_token(text.vocab_size)
    )


def _of_sizes(*, layers: int, width: int, side: int) -> LlavaConfig:
    """A LLaVA of `side` x `side` visual tokens with a CLIP tower of half the decoder's width."""
    vision = CLIPVisionConfig(
        hidden_size=width // 2,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        image_size=side * 14,
        patch_size=14,
    )
    return _llava(vision, llama(width, round(width * 2.6875), layers, 32000))


CLIP = tiny_shape(has_cls=True, text_twin=True, prefix=1, blocks_read=4)
SIGLIP = tiny_shape(has_cls=False, blocks_read=5)


def tiny_llava(vision: Any, text: Any, **options: Any) -> LlavaConfig:
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=36,
        **options,
    )


def _clip_llama() -> LlavaConfig:
    return tiny_llava(CLIPVisionConfig(**TOWER), LlamaConfig(**DECODER, num_key_value_heads=4))


def clip_mistral(sliding_window: int | None = None) -> LlavaConfig:
    text = MistralConfig(**DECODER, num_key_value_heads=2, sliding_window=sliding_window)
    return tiny_llava(CLIPVisionConfig(**TOWER), text)


def _siglip_qwen2() -> LlavaConfig:
    text = Qwen2Config(**DECODER, num_key_value_heads=2)
    vision = SiglipVisionConfig(**TOWER, vision_use_head=False)
    return tiny_llava(vision, text, vision_feature_select_strategy="full", vision_feature_layer=-1)


class Llava(EvalFamilyBySizes):
    line = "LLaVA"
    wrapper = "llava_hf"
    shapes = (
        Shape("llava-1.5-7b", lambda: _llava(clip(), llama()), (336, 336)),
        Shape("llava-1.5-13b", lambda: _llava(clip(), llama(5120, 13824, 40)), (336, 336)),
    )
    small_shapes = (
        Shape("llava-small", lambda: _of_sizes(layers=12, width=1024, side=24), (336, 336)),
        Shape("llava-1.5-encoder", lambda: _llava(clip(), llama(1024, 2752, 2)), (336, 336)),
    )
    tiny = (
        Case("llava-clip-llama", _clip_llama, CLIP, checked=True),
        Case("llava-clip-mistral", clip_mistral, CLIP),
        Case("llava-siglip-qwen2", _siglip_qwen2, SIGLIP, checked=True),
    )

    def of_sizes(self, *, layers: int, width: int, side: int) -> LlavaConfig:
        return _of_sizes(layers=layers, width=width, side=side)

    def usual_picture(self, config: Any) -> tuple[int, int]:
        side = config.vision_config.image_size
        return side, side

    def processor(self, config: Any, tokenizer: Any) -> LlavaProcessor:
        vision = config.vision_config
        size = {"height": vision.image_size, "width": vision.image_size}
        return LlavaProcessor(
            CLIPImageProcessor(size={"shortest_edge": vision.image_size}, crop_size=size),
            tokenizer,
            patch_size=vision.patch_size,
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            num_additional_image_tokens=1,
            image_token=tokenizer.image_token,
        )

    def smaller(self, config: Any, processor: Any, count: Count) -> Smaller:
        return smaller_square(config.vision_config, processor, count)

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        side = config.vision_config.image_size
        if picture != (side, side):
            raise MethodFieldError(
                f"A picture of {picture[0]}x{picture[1]}: this model sees {side}x{side} only."
            )
        tokens = (side // config.vision_config.patch_size) ** 2
        return Pixels(tokens, {"pixel_values": noise(device, batch_size, 3, side, side)})
