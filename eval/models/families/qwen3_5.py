"""Qwen3.5: three layers with a state to one with attention, behind Qwen3-VL's encoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from transformers import Qwen3_5Config

from ..family import Shape
from ..tiny_layouts import DECODER, MROPE
from ..tiny_models import Case
from .qwen2_vl import MERGING, tiny_config
from .qwen3_vl import Qwen3VL, Timestamped

ATTENTION = (1, 3)
DECODER_SHAPE = replace(MERGING.decoder, attention_layers=ATTENTION)


def sized(config_class: Any = Qwen3_5Config, *, width: int = 4096, **text: Any) -> Any:
    """Qwen3.5-9B, the sizes that `transformers` has for it; `text`: what differs in the decoder."""
    text = {"hidden_size": width, **text}
    return config_class(text_config=text, vision_config={"out_hidden_size": width})


def tiny(config_class: Any = Qwen3_5Config, **text: Any) -> Any:
    """The tiny model: every other layer has attention, which turns half of each head."""
    layers = DECODER["num_hidden_layers"]
    kinds = ["full_attention" if n in ATTENTION else "linear_attention" for n in range(layers)]
    sizes = {"linear_key_head_dim": 8, "linear_value_head_dim": 16}
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 32}
    rope = {"rope_parameters": {**MROPE, "partial_rotary_factor": 0.5}, "layer_types": kinds}
    return tiny_config(
        config_class,
        {**sizes, **heads, **rope, **text},
        hidden_size=48,
        intermediate_size=64,
        out_hidden_size=DECODER["hidden_size"],
        num_position_embeddings=36,
    )


class Qwen35(Qwen3VL):
    wrapper: ClassVar[str] = "qwen3_5"
    shapes: ClassVar[tuple[Shape, ...]] = (Shape("qwen3.5-9b", sized, (1024, 1024)),)
    small_shapes: ClassVar[tuple[Shape, ...]] = ()
    tiny: ClassVar[tuple[Case, ...]] = (
        Case(
            "qwen3_5",
            partial(tiny),
            replace(MERGING, decoder=DECODER_SHAPE),
            Timestamped(),
            fixed_positions=True,
        ),
    )
