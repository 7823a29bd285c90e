"""Gemma 4: patches of each picture in a padded row, frames of a video between times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Gemma4Config

from ..family import EvalFamily, Pixels, Shape, noise
from ..tiny_layouts import (
    DECODER,
    FRAMES,
    IMAGE,
    PATCH_GRIDS,
    TOWER,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Row,
    images,
)
from ..tiny_layouts import noise as drawn
from ..tiny_models import Case, tiny_shape
from .qwen3_vl import Timestamped

_TEXT = {"final_logit_softcapping": 30.0}
_LARGE = {
    **_TEXT,
    "sliding_window": 1024,
    "attention_k_eq_v": True,
    "use_bidirectional_attention": "vision",
    "hidden_size_per_layer_input": 0,
}


def _published(text: dict[str, Any], **vision: Any) -> Gemma4Config:
    """Without what hears; what is not said is the configurations' own."""
    return Gemma4Config(text_config=text, vision_config=vision, audio_config=None)


def _e2b() -> Gemma4Config:
    return _published(
        {
            **_TEXT,
            "hidden_size": 1536,
            "intermediate_size": 6144,
            "num_hidden_layers": 35,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
            "num_kv_shared_layers": 20,
            "use_double_wide_mlp": True,
        },
        use_clipped_linears=True,
    )


def _large(**text: Any) -> Gemma4Config:
    """A tower of the sizes of SigLIP-So400m."""
    return _published(
        _LARGE | text,
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=72,
        standardize=True,
    )


def _26b() -> Gemma4Config:
    return _large(
        hidden_size=2816,
        intermediate_size=2112,
        num_hidden_layers=30,
        num_attention_heads=16,
        num_key_value_heads=8,
        num_global_key_value_heads=2,
        enable_moe_block=True,
        num_experts=128,
        top_k_experts=8,
        moe_intermediate_size=704,
    )


def _31b() -> Gemma4Config:
    return _large(
        hidden_size=5376,
        intermediate_size=21504,
        num_hidden_layers=60,
        num_attention_heads=32,
        num_key_value_heads=16,
        num_global_key_value_heads=4,
    )


def tiny_gemma4(window: int = 512, both_ways: str | None = "vision", **more: Any) -> Gemma4Config:
    """Heads of full layers are wider, and keys are values there, as in the published 31B."""
    text = {
        **DECODER,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": window,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "use_bidirectional_attention": both_ways,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB,
        "tie_word_embeddings": False,
    }
    vision = {key: size for key, size in TOWER.items() if key != "image_size"}
    heads = {"num_key_value_heads": 4, "head_dim": 12}
    pooling = {"pooling_kernel_size": 2, "position_embedding_size": 160}
    return Gemma4Config(
        text_config={**text, **more},
        vision_config={**vision, **heads, **pooling},
        audio_config=None,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        boi_token_id=VISION_START,
        eoi_token_id=VISION_END,
        tie_word_embeddings=False,
    )


def patch_places(rows: int, columns: int) -> Tensor:
    """Column and row of each patch, row by row: (rows * columns, 2)."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).flip(-1)


class PooledByPlace(Timestamped):
    """Each picture padded to the longest; frames of a video have marks and a time before each."""

    packed = False

    def extra(self, rows: Sequence[Row], ids: Tensor) -> dict[str, Any]:
        inputs = {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            names = [n for n in images(rows) if (n in FRAMES) == (kind == "video")]
            if not names:
                continue
            grids = [PATCH_GRIDS[name] for name in names]
            seen = [frame for name in names for frame in self.pixels(name)]
            places = [patch_places(h, w) for t, h, w in grids for _ in range(t)]
            inputs[pixels] = pad_sequence(seen, batch_first=True)
            padded = pad_sequence(places, batch_first=True, padding_value=-1)
            inputs[f"{kind}_position_ids"] = padded
            if kind == "video":
                inputs["num_frames_per_video"] = torch.tensor([t for t, _, _ in grids])
        return inputs

    def pixels(self, image: str) -> Tensor:
        """Patches of each frame: (frames, patches, 3 * 4 * 4), from 0 to 1."""
        frames, *grid = PATCH_GRIDS[image]
        return drawn(image, frames, math.prod(grid), 3 * 4 * 4).sigmoid()


POOLING = tiny_shape(has_cls=False, merge_unit=4, rotary=True)


class Gemma4(EvalFamily):
    line = "Gemma"
    wrapper = "vlmprune"  # lmms-eval has none
    shapes = (
        Shape("gemma-4-e2b", _e2b, (768, 768)),
        Shape("gemma-4-26b-a4b", _26b, (768, 768)),
        Shape("gemma-4-31b", _31b, (768, 768)),
    )
    tiny = (Case("gemma4", tiny_gemma4, POOLING, PooledByPlace()),)

    def usual_picture(self, config: Any) -> tuple[int, int]:
        """16 x 16 tokens, near the 280 that the processor allows."""
        side = 16 * config.vision_config.patch_size * config.vision_config.pooling_kernel_size
        return side, side

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        vision = config.vision_config
        unit = vision.patch_size * vision.pooling_kernel_size
        rows, columns = (max(1, side // unit) * vision.pooling_kernel_size for side in picture)
        values = noise(device, batch_size, rows * columns, 3 * vision.patch_size**2)
        places = patch_places(rows, columns).expand(batch_size, -1, -1)
        inputs = {"pixel_values": values, "image_position_ids": places}
        marks = (config.boi_token_id, config.eoi_token_id)
        return Pixels(rows * columns // vision.pooling_kernel_size**2, inputs, marks)

    def kinds(self, config: Any, ids: Tensor) -> dict[str, Tensor]:
        return {"mm_token_type_ids": (ids == config.image_token_id).int()}
