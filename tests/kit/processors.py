"""The real processors of every family, for the tiny models: words are "w<i>", pictures small."""

from __future__ import annotations

import transformers
from kit import zoo
from tokenizers import Tokenizer, models, pre_tokenizers

LLAVA = {"image_token": "<image>", "video_token": "<video>"}
QWEN = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_bos_token": "<|vision_start|>",
    "vision_eos_token": "<|vision_end|>",
}
IDS = {
    "image_token": zoo.IMAGE,
    "video_token": zoo.VIDEO,
    "vision_bos_token": zoo.VISION_START,
    "vision_eos_token": zoo.VISION_END,
}


def tokenizer(special: dict[str, str]) -> transformers.PreTrainedTokenizerFast:
    """Word i of the tiny models' vocabulary is "w<i>", unless it is special."""
    texts = {IDS[name]: text for name, text in special.items()} | {zoo.PAD: "<pad>"}
    words = {texts.get(i, f"w{i}"): i for i in range(zoo.VOCAB)}
    built = Tokenizer(models.WordLevel(words, unk_token="w3"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built,
        pad_token="<pad>",
        padding_side="left",
        additional_special_tokens=list(special.values()),
        extra_special_tokens=special,
    )


def llava():
    side = {"height": zoo.PIXELS, "width": zoo.PIXELS}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": zoo.PIXELS}, crop_size=side)
    return transformers.LlavaProcessor(
        images,
        tokenizer(LLAVA),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_next():
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": zoo.PIXELS},
        crop_size={"height": zoo.PIXELS, "width": zoo.PIXELS},
        image_grid_pinpoints=zoo.PINPOINTS,
    )
    return transformers.LlavaNextProcessor(
        images,
        tokenizer(LLAVA),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_onevision():
    size = {"height": zoo.PIXELS, "width": zoo.PIXELS}
    images = transformers.LlavaOnevisionImageProcessor(
        size=size, image_grid_pinpoints=zoo.PINPOINTS
    )
    return transformers.LlavaOnevisionProcessor(
        images,
        tokenizer(LLAVA),
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=zoo.SIDE**2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio=zoo.ASPECT_RATIO,
    )


def qwen(processor: str, videos: str):
    options = {
        "patch_size": 4,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 64, "longest_edge": 2560},
        "do_sample_frames": False,
    }
    return getattr(transformers, processor)(
        transformers.Qwen2VLImageProcessor(**options),
        tokenizer(QWEN),
        getattr(transformers, videos)(**options),
    )


PROCESSORS = {
    "llava-clip-llama": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": lambda: qwen("Qwen2VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": lambda: qwen("Qwen2_5_VLProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": lambda: qwen("Qwen3VLProcessor", "Qwen3VLVideoProcessor"),
}
