"""A tiny random LLaVA saved as vLLM reads it: weights, tokenizer and image processor."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    SiglipVisionConfig,
)

WORDS = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *(f"w{i}" for i in range(59))]
SIDE, PATCH = 84, 14
TOKENS = (SIDE // PATCH) ** 2


def config() -> LlavaConfig:
    """36 tokens an image; heads of 32, which all attention kernels of CPUs have."""
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, image_seq_length=TOKENS
    )


def siglip_config() -> LlavaConfig:
    """The same with a SigLIP tower, whose last layer is read."""
    usual = config()
    clip = usual.vision_config
    vision = SiglipVisionConfig(
        hidden_size=clip.hidden_size,
        intermediate_size=clip.intermediate_size,
        num_hidden_layers=clip.num_hidden_layers,
        num_attention_heads=clip.num_attention_heads,
        image_size=SIDE,
        patch_size=PATCH,
        vision_use_head=False,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=usual.text_config,
        image_token_index=usual.image_token_id,
        image_seq_length=TOKENS,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def save(folder: Path, of: LlavaConfig | None = None) -> None:
    """A whole checkpoint of `config`, or of another one."""
    torch.manual_seed(0)
    write(LlavaForConditionalGeneration(of or config()).eval(), processor(of or config()), folder)


def write(model: PreTrainedModel, its_processor: ProcessorMixin, folder: Path) -> None:
    """A checkpoint of a model with a CLIP or SigLIP tower, with weights drawn anew."""
    for weight in model.parameters():  # far from ties
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(folder)
    weights = folder / "model.safetensors"
    plain = load_file(weights)
    prefix = "vision_tower."  # published checkpoints have one name more than this release saves
    if not any("vision_tower.vision_model." in name for name in plain):
        plain = {n.replace(prefix, f"{prefix}vision_model."): t for n, t in plain.items()}
    save_file(plain, weights, metadata={"format": "pt"})
    its_processor.save_pretrained(folder)


def tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """Words that are numbers; `more`: further special ones, behind `<image>`."""
    words = [*WORDS[:5], *more, *WORDS[5 + len(more) :]]
    tokens = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>", *more],
    )


def processor(of: LlavaConfig | None = None) -> LlavaProcessor:
    """For `config`, or another one, whose pictures are of the same size."""
    strategy = (of or config()).vision_feature_select_strategy
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    return LlavaProcessor(
        images,
        tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy=strategy,
        num_additional_image_tokens=int(strategy == "default"),
        image_token="<image>",
    )


def picture(seed: int, width: int = 100, height: int = 100) -> Image.Image:
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (7, 7, 3), generator=draw, dtype=torch.uint8)
    return Image.fromarray(coarse.numpy()).resize((width, height))
