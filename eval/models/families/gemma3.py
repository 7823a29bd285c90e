"""Gemma 3: SigLIP-So400m whose patches are averaged 4 x 4, and sliding layers between full ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import Gemma3Config, Gemma3TextConfig, SiglipVisionConfig

from ....prune.tiling import Tiling
from ..family import EvalFamily, Pixels, Shape
from ..tiny_layouts import DECODER, IMAGE, SIDE, TOWER, VISION_END, VISION_START, Plain, Row
from ..tiny_models import Case, tiny_shape
from .llava import Llava
from .paligemma import SO400M


def _gemma3() -> Gemma3Config:
    """Gemma 3 4B."""
    text = Gemma3TextConfig(
        vocab_size=262208,
        hidden_size=2560,
        intermediate_size=10240,
        num_hidden_layers=34,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
        sliding_window=1024,
    )
    vision = SiglipVisionConfig(**SO400M, image_size=896)
    return Gemma3Config(vision_config=vision, text_config=text, mm_tokens_per_image=256)


def tiny_gemma3(window: int = 512) -> Gemma3Config:
    text = Gemma3TextConfig(
        **DECODER,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=False,
    )
    return Gemma3Config(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=(SIDE // 2) ** 2,
        image_token_index=IMAGE,
        boi_token_index=VISION_START,
        eoi_token_index=VISION_END,
    )


class Averaged(Plain):
    """One square of 2 x 2 patches a token between two marks; which tokens are an image's."""

    def tiling(self, image: str, alone: bool) -> Tiling:
        return Tiling.single(SIDE // 2, SIDE // 2)

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        return [VISION_START, *tokens, VISION_END]

    def extra(self, rows: Sequence[Row], ids: Tensor) -> dict[str, Any]:
        return super().extra(rows, ids) | {"token_type_ids": (ids == IMAGE).long()}


AVERAGING = tiny_shape(has_cls=False, merge_unit=4)


class Gemma3(EvalFamily):
    line = "Gemma"
    wrapper = "gemma3"
    shapes = (Shape("gemma-3-4b", _gemma3, (896, 896)),)
    tiny = (Case("gemma3", tiny_gemma3, AVERAGING, Averaged()),)

    def usual_picture(self, config: Any) -> tuple[int, int]:
        return Llava().usual_picture(config)

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        made = Llava().pixels(config, picture, batch_size, device)
        return Pixels(config.mm_tokens_per_image, made.inputs)

    def kinds(self, config: Any, ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": (ids == config.image_token_id).long()}
