"""What tests need of Gemma 4: its tiny models, and its real processor."""

from __future__ import annotations

from dataclasses import replace

import torch
import transformers
from kit.words import tokenizer
from vlmprune.eval.models.families.gemma4 import POOLING, PooledByPlace, tiny_gemma4
from vlmprune.eval.models.tiny_models import Case

CASES = ("gemma4",)
ONE = "gemma4"
TYPES = "mm_token_type_ids"
"""The argument that says which tokens see each other both ways."""
MARKS = {"image_token": "<|image|>", "video_token": "<|video|>"}
LISTS = 2
"""Of two prompts: one without images has a list of none."""
WINDOWED = Case("gemma4-windowed", lambda: tiny_gemma4(12), POOLING, PooledByPlace())
"""Windows shorter than the prompts, in which images see each other both ways."""
CAUSAL = Case("gemma4-causal", lambda: tiny_gemma4(both_ways=None), POOLING, PooledByPlace())
"""As the smaller published ones, whose images are causal."""
SHARING = Case(
    "gemma4-sharing",
    lambda: tiny_gemma4(
        12,
        both_ways=None,
        num_hidden_layers=8,
        layer_types=["sliding_attention", "full_attention"] * 4,
        attention_k_eq_v=False,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
        hidden_size_per_layer_input=8,
    ),
    replace(POOLING, decoder=replace(POOLING.decoder, num_layers=8)),
    PooledByPlace(),
)
"""As E2B and E4B: inputs of its own for each layer, and last layers that read earlier ones' keys;
layer 4 is the last that can be cut."""
EXPERTS = Case(
    "gemma4-experts",
    lambda: tiny_gemma4(
        enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32
    ),
    replace(POOLING, decoder=replace(POOLING.decoder, expert_layers=(0, 1, 2, 3))),
    PooledByPlace(),
)
"""As 26B-A4B: experts beside the MLP."""


def projected(core, rows: torch.Tensor) -> torch.Tensor:
    """Its encoder has merged patches itself."""
    return core.embed_vision(rows)


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    marks = {
        **MARKS,
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
        "audio_token": "<|audio|>",
    }
    options = {"patch_size": 4, "pooling_kernel_size": 2, "max_soft_tokens": 70}
    return transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(**options),
        tokenizer(marks),
        transformers.Gemma4VideoProcessor(**options, do_sample_frames=False),
    )
