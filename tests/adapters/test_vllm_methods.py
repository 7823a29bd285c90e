"""Every method before the LLM that vLLM serves answers there as in the patched model: for a
release, on every family that is compared in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import vlmprune
from kit import skips, tiny_internvl, tiny_llava, tiny_qwen, tiny_tiled
from kit.vllm import engine, patched, same, served
from transformers import AutoModelForImageTextToText
from vlmprune.prune.contract import Place
from vlmprune.prune.registry import method_class

pytestmark = [skips.needs("vllm"), skips.needs("every cell"), pytest.mark.slow]

NAMES = [name for name in vlmprune.methods() if method_class(name).place is Place.BEFORE_LLM]
REFUSED = {"random"}  # it is seeded by the pixels
RECEIVED = ({"scores": "received"}, {"pivot": "received"})
HELP = (
    {},
    *RECEIVED,
    {"layer": 1},
    *({"late": False, **more} for more in ({}, *RECEIVED, {"layer": 1})),
    {"relevance": "prompt"},
)
"""Fields with which a method is served; the first that work."""
ROOM = {"max_model_len": 512, "max_num_batched_tokens": 512}


class Model(NamedTuple):
    """How a tiny model is saved, its processor, what stands for a picture, the pictures' sizes, and
    the positions that vLLM gives where they are not those of the method."""

    save: Callable[[Path], None]
    processor: Callable[[], Any]
    mark: str = "<image>"
    sizes: tuple[tuple[int, int], ...] = ((84, 84), (190, 90), (100, 150))
    positions: str | None = "repacked"

    def prompts(self) -> list[Any]:
        square, wide, tall = (tiny_llava.picture(n, *size) for n, size in enumerate(self.sizes, 1))
        mark = self.mark
        return [
            (f"w10 {mark} w20 w30", {"image": [square]}),
            (f"w10 {mark} w40 w50", {"image": [wide]}),
            (f"w50 {mark} w20 {mark} w30", {"image": [tall, square]}),
            ("w10 w20 w30", {}),
        ]


def _qwen(family: str) -> Model:
    return Model(
        lambda folder: tiny_qwen.save(folder, family),
        lambda: tiny_qwen.processor(family),
        "<|vision_start|> <|image_pad|> <|vision_end|>",
        ((40, 40), (64, 24), (24, 64)),
        None,
    )


MODELS = {
    "llava": Model(tiny_llava.save, tiny_llava.processor),
    "llava_next": Model(tiny_tiled.save_next, tiny_tiled.next_processor),
    "llava_onevision": Model(tiny_tiled.save_onevision, tiny_tiled.onevision_processor),
    "internvl": Model(
        tiny_internvl.save,
        tiny_internvl.processor,
        "<IMG_CONTEXT>",
        ((24, 24), (72, 24), (24, 48)),
    ),
    **{family: _qwen(family) for family in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
}


def arguments(folder: Path, name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Fields of the method, and what vLLM is given; None where it is refused with all of `HELP`."""
    for fields in HELP:
        try:
            return fields, vlmprune.vllm_args(str(folder), name, keep_ratio=0.25, **fields)
        except vlmprune.VlmpruneError:
            continue
    return None


@pytest.mark.parametrize("family", MODELS)
def test_every_method_answers_as_in_the_patched_model(tmp_path, family):
    model = MODELS[family]
    model.save(tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval()
    refused, wrong = set(), {}
    for name in NAMES:
        if (given := arguments(tmp_path, name)) is None:
            refused.add(name)
            continue
        fields, args = given
        options = {**fields, **({"positions": model.positions} if model.positions else {})}
        wanted = patched(
            plain, model.processor(), model.prompts(), name, keep_ratio=0.25, **options
        )
        try:
            same(served(engine(tmp_path, **ROOM, **args), model.prompts()), wanted)
        except AssertionError as error:
            wrong[name] = f"{fields}: {error}"
    assert not wrong, "\n".join(f"{name} {what}" for name, what in wrong.items())
    assert refused == REFUSED
