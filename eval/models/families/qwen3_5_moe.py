"""Qwen3.5-MoE: Qwen3.5 with experts in the decoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from transformers import Qwen3_5MoeConfig

from ..family import Shape
from ..tiny_layouts import DECODER
from ..tiny_models import Case
from .qwen2_vl import MERGING
from .qwen3_5 import DECODER_SHAPE, Qwen35, sized, tiny
from .qwen3_vl import Timestamped
from .qwen3_vl_moe import EXPERTS

_EXPERTS = {**EXPERTS, "shared_expert_intermediate_size": 16}
_LAYERS = tuple(range(DECODER["num_hidden_layers"]))
_DECODER = replace(DECODER_SHAPE, intermediate_size=2 * 24 + 16, expert_layers=_LAYERS)


def _tiny() -> Any:
    """As published: nothing says how wide an MLP without experts would be."""
    config = tiny(Qwen3_5MoeConfig, **_EXPERTS)
    del config.text_config.intermediate_size
    return config


class Qwen35Moe(Qwen35):
    shapes = (Shape("qwen3.5-35b-a3b", partial(sized, Qwen3_5MoeConfig, width=2048), (1024, 1024)),)
    tiny = (
        Case(
            "qwen3_5_moe",
            _tiny,
            replace(MERGING, decoder=_DECODER),
            Timestamped(),
            fixed_positions=True,
        ),
    )
