"""PaliGemma: SigLIP-So400m and Gemma, or Gemma 2 behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Gemma2Config, GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

from ..family import EvalFamily, Pixels, Shape
from ..tiny_layouts import DECODER, IMAGE, TOWER, Plain, Row
from ..tiny_models import Case, tiny_shape
from .llava import Llava

SO400M = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
_IMAGE_TOKEN = 257152


def _paligemma(side: int) -> PaliGemmaConfig:
    """PaliGemma 3B: Gemma 2B."""
    text = GemmaConfig(
        vocab_size=257216,
        hidden_size=2048,
        intermediate_size=16384,
        num_hidden_layers=18,
        num_attention_heads=8,
        num_key_value_heads=1,
        head_dim=256,
    )
    return _config(SiglipVisionConfig(**SO400M, image_size=side), text, _IMAGE_TOKEN)


def _config(vision: Any, text: Any, image_token: int) -> PaliGemmaConfig:
    return PaliGemmaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        projection_dim=text.hidden_size,
    )


def tiny_paligemma(text: Any) -> PaliGemmaConfig:
    return _config(SiglipVisionConfig(**TOWER, vision_use_head=False), text, IMAGE)


def _tiny() -> PaliGemmaConfig:
    """PaliGemma 1."""
    text = GemmaConfig(**DECODER, num_key_value_heads=1, head_dim=16, tie_word_embeddings=False)
    return tiny_paligemma(text)


def tiny_paligemma2(window: int = 512) -> PaliGemmaConfig:
    """PaliGemma 2: logits that are capped, and windows in every other layer."""
    sizes = {"num_key_value_heads": 2, "head_dim": 16, "query_pre_attn_scalar": 16}
    text = Gemma2Config(**DECODER, **sizes, sliding_window=window, tie_word_embeddings=False)
    text.attn_logit_softcapping = 2.0
    return tiny_paligemma(text)


class Asked(Plain):
    """Pictures as everywhere; nothing of a prompt is an answer."""

    def extra(self, rows: Sequence[Row], ids: Tensor) -> dict[str, Any]:
        return super().extra(rows, ids) | {"token_type_ids": torch.zeros_like(ids)}


SIGLIP = tiny_shape(has_cls=False, blocks_read=5)


class PaliGemma(EvalFamily):
    line = "Gemma"
    wrapper = "vlmprune"  # lmms-eval has none
    shapes = (Shape("paligemma-3b-448", lambda: _paligemma(448), (448, 448)),)
    tiny = (Case("paligemma", _tiny, SIGLIP, Asked()),)

    def usual_picture(self, config: Any) -> tuple[int, int]:
        return Llava().usual_picture(config)

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        return Llava().pixels(config, picture, batch_size, device)

    def kinds(self, config: Any, ids: Tensor) -> dict[str, Tensor]:
        return {"token_type_ids": torch.zeros_like(ids)}
