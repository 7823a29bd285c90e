"""Qwen3-VL-MoE: Qwen3-VL with experts in the decoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from transformers import Qwen3VLMoeConfig

from ..family import Shape
from ..tiny_models import Case
from .qwen2_vl import MERGING
from .qwen3_vl import Qwen3VL, Timestamped, sized, tiny

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_30B = partial(
    sized,
    Qwen3VLMoeConfig,
    width=2048,
    mlp=6144,
    layers=48,
    key_heads=4,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
)
_DECODER = replace(MERGING.decoder, intermediate_size=2 * 24, expert_layers=(0, 1, 2, 3))
_SHAPE = replace(MERGING, decoder=_DECODER)


class Qwen3VLMoe(Qwen3VL):
    shapes = (Shape("qwen3-vl-30b-a3b", _30B, (1024, 1024)),)
    small_shapes = ()
    tiny = (
        Case(
            "qwen3_vl_moe",
            partial(tiny, Qwen3VLMoeConfig, **EXPERTS),
            _SHAPE,
            Timestamped(),
            fixed_positions=True,
        ),
    )
