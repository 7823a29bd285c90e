"""Methods that read the question, in vLLM: an image's tokens are those of its own question."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import skips, tiny_llava, tiny_qwen, tiny_tiled
from kit.tiny_qwen import ABOUT, FRAMES
from kit.vllm import engine, patched, same, served
from transformers import AutoModelForImageTextToText

pytestmark = [skips.needs("vllm"), pytest.mark.slow]

QWEN = "<|vision_start|> <|image_pad|> <|vision_end|>"
FIRST, SECOND = tiny_llava.picture(1, 90, 60), tiny_llava.picture(2, 60, 90)
FILMS = {  # marks of a video, and what is shown
    "llava_onevision": ("<video>", FRAMES),
    "qwen2_5_vl": (QWEN.replace("image", "video"), (FRAMES, ABOUT)),
    "qwen3_vl": (QWEN.replace("image", "video"), (FRAMES, ABOUT)),
}
BUDGETS = ({"keep_ratio": 0.25}, {"keep_tokens": 12})
LIMITS = {"image": 2, "video": 1}
ROOM = {"max_model_len": 512, "max_num_batched_tokens": 12}  # chunks end inside images


def llava(folder):
    tiny_llava.save(folder)
    return tiny_llava.processor()


def llava_next(folder):
    tiny_tiled.save_next(folder)
    return tiny_tiled.next_processor()


def onevision(folder):
    tiny_tiled.save_onevision(folder)
    return tiny_tiled.onevision_processor()


def qwen(family):
    def save(folder):
        tiny_qwen.save(folder, family)
        return tiny_qwen.processor(family)

    return save


CASES = {
    "llava": (llava, "<image>", "repacked"),
    "llava_next": (llava_next, "<image>", "repacked"),
    "llava_onevision": (onevision, "<image>", "repacked"),
    "qwen2_5_vl": (qwen("qwen2_5_vl"), QWEN, "original"),
    "qwen3_vl": (qwen("qwen3_vl"), QWEN, "original"),
}


def prompts(mark):
    """One image, the same under another question, twice under two, asked before it, another, and
    none."""
    return [
        (f"w10 {mark} w20 w30 w40", {"image": [FIRST]}),
        (f"w10 {mark} w11 w12 w13 w14", {"image": [FIRST]}),
        (f"w15 {mark} w16 {mark} w17 w18", {"image": [FIRST, FIRST]}),
        (f"w50 w51 {mark}", {"image": [SECOND]}),
        (f"w15 {mark} w21 {mark} w20 w30 w40", {"image": [SECOND, FIRST]}),
        ("w10 w20 w30 w40 w50", {}),
    ]


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_the_patched_model_whatever_the_caches_hold(tmp_path, case):
    save, mark, positions = CASES[case]
    processor = save(tmp_path)
    words = {"relevance": "prompt"}
    args = vlmprune.vllm_args(str(tmp_path), "cdpruner", **words, **BUDGETS[0])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    words["positions"] = positions
    asked = prompts(mark)
    if case in FILMS:
        film, frames = FILMS[case]
        both = {"video": [frames], "image": [FIRST]}
        asked += [(f"w10 {film} w20 {mark} w30", both), (f"w10 {film} w21 {mark} w30", both)]
    wanted = [patched(model, processor, asked, "cdpruner", **words, **one) for one in BUDGETS]
    llm = engine(
        tmp_path, **args, **ROOM, **({"limit_mm_per_prompt": LIMITS} if case in FILMS else {})
    )
    for budget, expected in [*zip(BUDGETS, wanted, strict=True)] * 2:
        same(served(llm, asked, mm_processor_kwargs={"vlmprune": budget}), expected)
    with pytest.raises(Exception, match="2 placeholders for 1 images"):
        served(llm, [(f"{mark} {mark} w10", {"image": [FIRST]})])
