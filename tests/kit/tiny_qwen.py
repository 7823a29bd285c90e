"""Tiny random models of Qwen's line saved as vLLM reads them, with heads of 32, which all attention
kernels of CPUs have."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from kit import tiny_llava
from vlmprune.eval.models.families.qwen2_vl import tiny_config

ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
TEXT = {
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "rope_parameters": ROPE,
}
VISION = {"num_heads": 2, "depth": 4}
WIDE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "out_hidden_size": 64,
    "num_position_embeddings": 36,
}
TURNS = ROPE | {"mrope_interleaved": True}
STATES = {
    "layer_types": ["full_attention", "linear_attention", "full_attention"],
    "rope_parameters": TURNS | {"partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]},
    "head_dim": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
CONFIGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_vl": ("Qwen2VL", {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 2}, {}),
    "qwen2_5_vl": (
        "Qwen2_5_VL",
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "out_hidden_size": 64,
            "window_size": 16,
            "fullatt_block_indexes": [1, 3],
        },
        {},
    ),
    "qwen3_vl": (
        "Qwen3VL",
        WIDE | {"deepstack_visual_indexes": [1, 2]},
        {"head_dim": 32, "rope_parameters": TURNS},
    ),
    "qwen3_5": ("Qwen3_5", WIDE, STATES),
}
"""Stems of the classes' names, and what differs in the encoder and in the decoder."""
FRAMES = np.stack([np.asarray(tiny_llava.picture(seed, 40, 24)) for seed in range(4, 8)])
ABOUT = {
    "fps": 2.0,
    "duration": 2.0,
    "total_num_frames": len(FRAMES),
    "frames_indices": list(range(len(FRAMES))),
    "video_backend": "opencv",
}
"""A video, of as many frames as text behind it has the same positions in vLLM and in transformers,
and what is known of it."""


def processor(family: str) -> Any:
    built = importlib.import_module(f"families.{family}").processor()
    for name in ("image_mean", "image_std"):  # vLLM takes those of images for videos
        setattr(built.video_processor, name, getattr(built.image_processor, name))
    return built


def model(folder: Path) -> Any:
    load = transformers.AutoModelForImageTextToText.from_pretrained
    return load(folder, dtype=torch.float32).eval()


def save(folder: Path, family: str) -> None:
    """A whole checkpoint."""
    stem, vision, text = CONFIGS[family]
    torch.manual_seed(0)
    config = tiny_config(getattr(transformers, f"{stem}Config"), TEXT | text, **VISION, **vision)
    built = getattr(transformers, f"{stem}ForConditionalGeneration")(config).eval()
    for weight in built.parameters():  # far from ties
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    built.save_pretrained(folder)
    processor(family).save_pretrained(folder)
