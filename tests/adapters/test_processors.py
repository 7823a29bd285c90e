"""What the real processors of every family give, pictures of any size, runs on a patched model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
import vlmprune
from kit import zoo
from PIL import Image
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


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encode(case: zoo.Case, text: list[str], **media):
    """Placeholders in `text` are written {image} and {video}."""
    words = {"image": LLAVA["image_token"], "video": LLAVA["video_token"]}
    if case.qwen:
        frame = "<|vision_start|> {} <|vision_end|>"
        words = {kind: frame.format(QWEN[f"{kind}_token"]) for kind in words}
    prompts = [line.format(**words) for line in text]
    return PROCESSORS[case.name]()(text=prompts, padding=True, return_tensors="pt", **media)


def check(case: zoo.Case, inputs, images: int) -> None:
    """Every method's budget is exact, and what is encoded is what the prompt has room for."""
    model = case.model()
    placeholders = int(zoo.is_visual(inputs["input_ids"]).sum())
    for name in (
        "divprune",
        "hiprune",
        "pool",
        "fastv",
        "transprune",
        "sparsevlm",
        "elastic_cache",
    ):
        with vlmprune.patch(model, name, keep_ratio=0.3) as handle, torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 3
        last = handle.last
        assert len(last.tokens_in) == images and sum(last.tokens_in) == placeholders
        kept = [round(0.3 * n) for n in last.tokens_in]
        assert last.tokens_kept == (last.tokens_in if name in zoo.ON_CACHE else kept)
        for row, entries in enumerate(zip(*last.entries, strict=True)):
            of_row = [n for n, sample in zip(kept, last.image_sample, strict=True) if sample == row]
            wanted = last.text_tokens[row] + sum(of_row)
            assert {of_layer.shape[-1] for of_layer in entries} == {wanted}


CASES = pytest.mark.parametrize("name", PROCESSORS)


@CASES
@pytest.mark.parametrize("size", [(40, 30), (100, 20), (17, 90), (48, 48)], ids=str)
def test_pictures_of_any_shape(name, size):
    case = zoo.CASES[name]
    check(case, encode(case, ["w5 {image} w6 w7"], images=[[picture(*size)]]), 1)


@CASES
def test_several_pictures_and_rows(name):
    case = zoo.CASES[name]
    rows = ["w5 {image} w6 w7", "w8 {image} w9 {image} w10"]
    images = [[picture(40, 30)], [picture(100, 20), picture(50, 50)]]
    check(case, encode(case, rows, images=images), 3)


@pytest.mark.parametrize("name", [n for n in PROCESSORS if zoo.CASES[n].layout.takes_videos])
def test_videos(name):
    case = zoo.CASES[name]
    clip = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3)).astype(np.uint8)
    check(case, encode(case, ["w5 {video} w6"], videos=[clip]), 1)
    rows = ["w5 {image} w6", "w8 {video} w9"]
    check(case, encode(case, rows, images=[[picture(40, 32)]], videos=[clip]), 2)


def test_every_family_has_a_processor_here():
    families = {zoo.CASES[name].reference().config.model_type for name in PROCESSORS}
    assert families == set(vlmprune.models())
