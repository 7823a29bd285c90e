"""SmolVLM2: Idefics 3 in small, its tiles of 512 pixels 64 tokens each."""

from __future__ import annotations

from typing import Any

from transformers import SmolVLMConfig, SmolVLMVisionConfig

from ..family import Shape
from ..tiny_models import Case
from .idefics3 import SHUFFLED, Idefics3, NamedTiles, siglip_llama, tiny_idefics3


def _smolvlm2(
    width: int,
    mlp: int,
    layers: int,
    heads: tuple[int, int],
    tower: int,
    depth: int,
    **options: Any,
) -> SmolVLMConfig:
    """`heads`: of queries and of keys."""
    text = {
        "vocab_size": 49280,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 64,
    }
    vision = SmolVLMVisionConfig(
        hidden_size=tower,
        intermediate_size=4304 if tower == 1152 else 3072,
        num_hidden_layers=depth,
        num_attention_heads=tower // 72 if tower == 1152 else tower // 64,
        **options,
    )
    scale = {"scale_factor": 3 if tower == 1152 else 4, "tie_word_embeddings": False}
    return siglip_llama(SmolVLMConfig, vision, 49190, text, **scale)


def _of_2b() -> SmolVLMConfig:
    """SmolVLM2-2.2B: SigLIP-SO400M/384 and SmolLM2-1.7B."""
    return _smolvlm2(2048, 8192, 24, (32, 32), 1152, 27, image_size=384, patch_size=14)


def _of_500m() -> SmolVLMConfig:
    """SmolVLM2-500M: SigLIP-B/16-512 and SmolLM2-360M."""
    return _smolvlm2(960, 2560, 32, (15, 5), 768, 12, image_size=512, patch_size=16)


def _tiny() -> Any:
    return tiny_idefics3(SmolVLMConfig, SmolVLMVisionConfig)


class SmolVLM(Idefics3):
    line = "SmolVLM"
    shapes = (Shape("smolvlm2-2.2b", _of_2b, (1536, 1536)),)
    small_shapes = (Shape("smolvlm2-500m", _of_500m, (512, 512)),)
    tiny = (Case("smolvlm", _tiny, SHUFFLED, NamedTiles((110,))),)
