"""The text encoder that belongs to the CLIP towers of the tiny models, with random weights."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    PreTrainedTokenizerFast,
)

from ...adapters.clip_text import ClipText
from ..models.tiny_layouts import TOWER, VOCAB

WORDS = ["[PAD]", "[BOS]", "[EOS]", *(f"w{i}" for i in range(VOCAB))]


@functools.cache
def words() -> PreTrainedTokenizerFast:
    """Word i of the model's vocabulary is "w<i>"."""
    return PreTrainedTokenizerFast(tokenizer_object=_tokenizer(WORDS[3:]))


@functools.cache
def clip_words() -> PreTrainedTokenizerFast:
    """The same words behind three special ones."""
    return PreTrainedTokenizerFast(tokenizer_object=_tokenizer(WORDS), pad_token="[PAD]")


@functools.cache
def clip(length: int = 12, width: int = TOWER["hidden_size"]) -> ClipText:
    """Segments of `length` tokens, a vision tower of `width`."""
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=1,
        eos_token_id=2,
    )
    vision = CLIPVisionConfig(**{**TOWER, "hidden_size": width})
    config = CLIPConfig(
        text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16
    )
    return ClipText(CLIPModel(config), clip_words(), words())


def _tokenizer(vocabulary: Sequence[str]) -> Tokenizer:
    numbered = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(numbered, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer
