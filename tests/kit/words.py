"""Tokenizers of the tiny models' words, and the marks of pictures in them."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from vlmprune.eval.models.tiny_layouts import IMAGE, PAD, VIDEO, VISION_END, VISION_START, VOCAB

PLAIN = {"image_token": "<image>", "video_token": "<video>"}
FRAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
IDS = {
    "image_token": IMAGE,
    "video_token": VIDEO,
    "vision_bos_token": VISION_START,
    "vision_eos_token": VISION_END,
    "start_image_token": VISION_START,
    "end_image_token": VISION_END,
    "context_image_token": IMAGE,
    "fake_image_token": VISION_START,
    "end_of_utterance_token": VISION_END,
    "global_image_token": 110,
    "img_line_break_token": 110,
    "boi_token": VISION_START,
    "eoi_token": VISION_END,
}


def tokenizer(special: dict[str, str]) -> transformers.PreTrainedTokenizerFast:
    """Word i of the tiny models' vocabulary is "w<i>", unless it is special."""
    texts = {IDS[name]: text for name, text in special.items()} | {PAD: "<pad>"}
    words = {texts.get(i, f"w{i}"): i for i in range(VOCAB)}
    built = Tokenizer(models.WordLevel(words, unk_token="w3"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=list(special.values()),
        extra_special_tokens=special,
    )
