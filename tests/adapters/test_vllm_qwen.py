"""vLLM with the plugin, models with M-RoPE: kept tokens have their positions in the whole image."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import skips, tiny_llava, tiny_qwen
from kit.tiny_qwen import ABOUT, FRAMES
from kit.vllm import engine, near, patched, same, served

pytestmark = [skips.needs("vllm"), pytest.mark.slow]

MARK = "<|vision_start|> <|image_pad|> <|vision_end|>"
ONE, TWO = f"w10 {MARK} w20 w30 w40", f"w50 {MARK} w60 {MARK} w70 w80"
SQUARE, WIDE, TALL = (
    tiny_llava.picture(1, 40, 40),
    tiny_llava.picture(2, 64, 24),
    tiny_llava.picture(3, 24, 64),
)
FILM = "<|vision_start|> <|video_pad|> <|vision_end|>"
PROMPTS = [
    (ONE, {"image": [SQUARE]}),
    (ONE, {"image": [WIDE]}),
    (TWO, {"image": [TALL, SQUARE]}),
    ("w10 w20 w30 w40 w50", {}),
    (TWO, {"image": [WIDE, WIDE]}),
    (f"w10 {FILM} w20 {MARK} w30", {"video": [(FRAMES, ABOUT)], "image": [TALL]}),
]
LIMITS = {"limit_mm_per_prompt": {"image": 2, "video": 1}}
CELLS = {  # family, method, its fields, settings of the engine
    "features": ("qwen2_5_vl", "divprune", {}, {}),
    "received": ("qwen2_5_vl", "cls_topk", {"scores": "received"}, {}),
    "merging": ("qwen2_5_vl", "visionzip", {"scores": "received"}, {}),
    "nothing, chunked": ("qwen2_5_vl", "grid", {}, {"max_num_batched_tokens": 7}),
    "qwen2": ("qwen2_vl", "visionzip", {"scores": "received"}, {}),
    "deepstack, chunked": (
        "qwen3_vl",
        "visionzip",
        {"scores": "received"},
        {"max_num_batched_tokens": 7},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for family in tiny_qwen.CONFIGS:
        found[family] = tmp_path_factory.mktemp(family)
        tiny_qwen.save(found[family], family)
    return found


def wanted(folder, family, prompts, method, **options):
    model, processor = tiny_qwen.model(folder), tiny_qwen.processor(family)
    return patched(model, processor, prompts, method, **options)


@pytest.mark.parametrize("cell", CELLS)
def test_greedy_tokens_first_logprobs_and_lengths_are_those_of_the_patched_model(folders, cell):
    """Chunks of 7 tokens end inside images, of which 6 tokens are kept."""
    family, method, fields, settings = CELLS[cell]
    folder = folders[family]
    args = vlmprune.vllm_args(str(folder), method, keep_ratio=0.25, **fields)
    llm = engine(folder, **args, **settings, **LIMITS)
    expected = wanted(folder, family, PROMPTS, method, keep_ratio=0.25, **fields)
    same(served(llm, PROMPTS), expected)
    same(served(llm, PROMPTS), expected)  # from the caches


def test_a_decoder_that_keeps_states_gives_the_first_token_of_the_patched_model(folders):
    """vLLM's kernel on CPUs has bfloat16 alone; transformers exchanges the tokenizer of this kind
    of model for that of the published one."""
    folder, tokens = folders["qwen3_5"], folders["qwen3_vl"]
    args = vlmprune.vllm_args(str(folder), "grid", keep_ratio=0.25)
    llm = engine(folder, **args, **LIMITS, tokenizer=str(tokens), dtype="bfloat16")
    near(served(llm, PROMPTS), wanted(folder, "qwen3_5", PROMPTS, "grid", keep_ratio=0.25))


def test_a_request_has_its_own_budget_and_answers_depend_on_positions(folders, monkeypatch):
    from vlmprune.adapters.serving.families import mrope

    folder, prompts = folders["qwen2_5_vl"], PROMPTS[:3]
    args = vlmprune.vllm_args(str(folder), "divprune", keep_ratio=0.25)
    llm = engine(folder, **args, enable_mm_embeds=True)
    for words in ({"keep_tokens": 16}, {"keep_ratio": 1.0}):
        found = served(llm, prompts, mm_processor_kwargs={"vlmprune": words})
        expected = wanted(folder, "qwen2_5_vl", prompts, "divprune", **words)
        same(found, expected)
    same(served(llm, [(TWO, {"image": embedded(folder, [TALL, SQUARE])})]), expected[2:])
    monkeypatch.setattr(mrope, "offsets", lambda rows: torch.zeros(3, len(rows), dtype=torch.int64))
    lost = served(llm, prompts, mm_processor_kwargs={"vlmprune": words})
    assert [one[0] for one in lost] != [one[0] for one in expected]


def embedded(folder, images):
    """What the encoder of transformers makes of images, as vLLM takes it in place of them."""
    inputs = tiny_qwen.processor("qwen2_5_vl").image_processor(images, return_tensors="pt")
    with torch.no_grad():
        rows = tiny_qwen.model(folder).get_image_features(**inputs).pooler_output
    return {"image_embeds": torch.cat(list(rows)), "image_grid_thw": inputs["image_grid_thw"]}
