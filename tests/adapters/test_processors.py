"""What the real processors of every family give, pictures of any size, runs on a patched model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import vlmprune
from kit import zoo
from kit.words import framed
from PIL import Image


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 255, (height, width, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encode(case: zoo.Case, text: list[str], **media):
    """Placeholders in `text` are written {image} and {video}."""
    family = zoo.PROCESSORS[case.name]
    words = {kind: framed(family.MARKS, kind) for kind in ("image", "video")}
    prompts = [line.format(**words) for line in text]
    return family.processor()(text=prompts, padding=True, return_tensors="pt", **media)


METHODS = ("divprune", "hiprune", "pool", "fastv", "transprune", "sparsevlm", "elastic_cache")
"""The first is asked of every family."""


def check(case: zoo.Case, inputs, images: int) -> None:
    """Every method's budget is exact, and what is encoded is what the prompt has room for."""
    model = case.model()
    placeholders = int(zoo.is_visual(inputs["input_ids"]).sum())
    for name in METHODS if case in zoo.WHOLE_CASES else METHODS[:1]:
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


CASES = pytest.mark.parametrize("name", zoo.PROCESSORS)


@zoo.each(
    "size",
    [(40, 30), (100, 20), (17, 90), (48, 48)],
    [zoo.CASES[name] for name in zoo.PROCESSORS],
)
def test_pictures_of_any_shape(case, size):
    check(case, encode(case, ["w5 {image} w6 w7"], images=[[picture(*size)]]), 1)


@CASES
def test_several_pictures_and_rows(name):
    case = zoo.CASES[name]
    rows = ["w5 {image} w6 w7", "w8 {image} w9 {image} w10"]
    images = [[picture(40, 30)], [picture(100, 20), picture(50, 50)]]
    check(case, encode(case, rows, images=images), 3)


@pytest.mark.parametrize("name", [n for n in zoo.PROCESSORS if zoo.CASES[n].layout.takes_videos])
def test_videos(name):
    case = zoo.CASES[name]
    clip = np.random.default_rng(0).integers(0, 255, (4, 32, 48, 3)).astype(np.uint8)
    check(case, encode(case, ["w5 {video} w6"], videos=[clip]), 1)
    if case.layout.videos is not zoo.MIXED:  # the model takes no images beside them
        return
    rows = ["w5 {image} w6", "w8 {video} w9"]
    images = [[picture(40, 32)], []][: getattr(zoo.PROCESSORS[name], "LISTS", 1)]
    check(case, encode(case, rows, images=images, videos=[clip]), 2)


def test_every_family_has_a_processor_here():
    families = {zoo.CASES[name].reference().config.model_type for name in zoo.PROCESSORS}
    assert families == set(vlmprune.models())
