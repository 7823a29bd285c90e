"""Tokenizers of the tiny models' words, and the marks of pictures in them."""

from __future__ import annotations

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from vlmprune.eval.models.tiny_layouts import (
    IMAGE,
    PAD,
    VIDEO,
    VIDEO_END,
    VIDEO_START,
    VISION_END,
    VISION_START,
    VOCAB,
)

PLAIN = {"image_token": "<image>", "video_token": "<video>"}
FRAMED = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
FRAMES_AS_IMAGES = {
    "image_token": "<|image|>",
    "video_token": "<|video|>",
    "vision_bos_token": "<|begin_of_image|>",
    "vision_eos_token": "<|end_of_image|>",
    "video_bos_token": "<|begin_of_video|>",
    "video_eos_token": "<|end_of_video|>",
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
    "column_token": VIDEO_START,
    "row_token": VIDEO_END,
    "image_start_token": VISION_START,
    "image_end_token": VISION_END,
    "boi_token": VISION_START,
    "eoi_token": VISION_END,
    "boa_token": VIDEO_START,
    "eoa_token": VIDEO_END,
    "audio_token": 116,
    "video_bos_token": VIDEO_START,
    "video_eos_token": VIDEO_END,
}


def framed(marks: dict[str, str], kind: str) -> str:
    """What a prompt says where an image or a video is."""
    around = kind if f"{kind}_bos_token" in marks else "vision"
    names = (f"{around}_bos_token", f"{kind}_token", f"{around}_eos_token")
    return " ".join(marks[name] for name in names if name in marks)


def chat_template(marks: dict[str, str]) -> str:
    """Of a family's marks: who says what, pictures and videos between words."""
    words = {kind: framed(marks, kind) for kind in ("image", "video")}
    return (
        "{% for message in messages %}{{ message['role'] }} "
        "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} "
        f"{{% elif part['type'] == 'video' %}}{words['video']} {{% else %}}{words['image']} "
        "{% endif %}{% endfor %}{% endfor %}"
    )


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
