"""Tiny random LLaVA-NeXT and LLaVA-OneVision saved as vLLM reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from kit import tiny_llava
from kit.tiny_llava import PATCH, SIDE, TOKENS
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)

PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE]]
SQUARE = {"height": SIDE, "width": SIDE}


def next_processor() -> LlavaNextProcessor:
    images = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=SQUARE, image_grid_pinpoints=PINPOINTS
    )
    return LlavaNextProcessor(
        images,
        tiny_llava.tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
    )


def next_config() -> LlavaNextConfig:
    """With a CLIP tower."""
    usual = tiny_llava.config()
    return LlavaNextConfig(
        vision_config=usual.vision_config,
        text_config=usual.text_config,
        image_token_index=4,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=TOKENS,
    )


def save_next(folder: Path) -> None:
    torch.manual_seed(0)
    model = LlavaNextForConditionalGeneration(next_config()).eval()
    torch.nn.init.normal_(model.model.image_newline)
    tiny_llava.write(model, next_processor(), folder)


def onevision_processor() -> LlavaOnevisionProcessor:
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=PINPOINTS),
        tiny_llava.tokenizer("<video>"),
        LlavaOnevisionVideoProcessor(size=SQUARE),
        num_image_tokens=TOKENS,
        vision_feature_select_strategy="full",
        image_token="<image>",
        video_token="<video>",
    )


def onevision_config() -> LlavaOnevisionConfig:
    """With a SigLIP tower."""
    usual = tiny_llava.siglip_config()
    return LlavaOnevisionConfig(
        vision_config=usual.vision_config,
        text_config=usual.text_config,
        image_token_index=4,
        video_token_index=5,
        image_grid_pinpoints=PINPOINTS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def save_onevision(folder: Path) -> None:
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(onevision_config()).eval()
    torch.nn.init.normal_(model.model.image_newline)
    tiny_llava.write(model, onevision_processor(), folder)
