"""Which method runs on which model, found by running it: the table in the README."""

from __future__ import annotations

import functools

import pytest
import torch
import vlmprune
import zoo
from test_text import clip
from vlmprune.prune.contract import Place
from vlmprune.prune.registry import method_class

COLUMNS: dict[str, tuple[str, zoo.Row]] = {
    "llava (CLIP)": ("llava-clip-llama", (7, "C", 3)),
    "llava (SigLIP)": ("llava-siglip-qwen2", (7, "C", 3)),
    "llava_next": ("llava_next", (7, "A", 3)),
    "llava_onevision": ("llava_onevision", (7, "A", 3)),
    "llava_onevision, video": ("llava_onevision", (7, "V", 3)),
    "qwen2_vl": ("qwen2_vl", (7, "C", 3)),
    "qwen2_5_vl": ("qwen2_5_vl", (7, "C", 3)),
    "qwen3_vl": ("qwen3_vl", (7, "C", 3)),
    "qwen videos": ("qwen3_vl", (7, "V", 3)),
}
WAYS: dict[str, dict[str, object]] = {
    "works": {},
    "`scores='received'`": {"scores": "received"},
    "`pivot='received'`": {"pivot": "received"},
    "`clip=`": {"clip": True},
}


@functools.cache
def way(name: str, column: str) -> str:
    """The first of `WAYS` in which a method keeps 40 % of an image's tokens, or of their entries in
    the cache; "no" if none does.

    Anything but a typed refusal is a failure of the caller's test.
    """
    case_name, row = COLUMNS[column]
    case = zoo.CASES[case_name]
    model, inputs = case.model(), case.inputs((row,))
    for words, options in WAYS.items():
        given = options | zoo.SMALL.get(name, {})
        if given.pop("clip", None):
            given["clip"] = clip()
        try:
            handle = vlmprune.patch(model, name, keep_ratio=0.4, **given)
        except (vlmprune.MissingSignalError, vlmprune.MethodFieldError):
            continue
        with torch.no_grad(), handle:
            model(**inputs)
        (count,) = case.counts((row,))
        kept = round(0.4 * count)
        assert handle.last.tokens_kept == [count if name in zoo.ON_CACHE else kept], (name, column)
        for (entries,) in handle.last.entries:
            assert entries.shape[-1] == handle.last.text_tokens[0] + kept
        return words
    return "no"


def method_support() -> str:
    """Method x family as Markdown."""
    lines = [f"| Method | {' | '.join(COLUMNS)} |", f"| --- |{' --- |' * len(COLUMNS)}"]
    lines += [
        f"| {name} | {' | '.join(way(name, column) for column in COLUMNS)} |"
        for name in vlmprune.methods()
    ]
    return "\n".join(lines)


@pytest.mark.parametrize("name", vlmprune.methods())
@pytest.mark.parametrize("column", COLUMNS)
def test_the_method_runs_or_says_why_not(name, column):
    assert way(name, column) in {*WAYS, "no"}


@pytest.mark.parametrize("column", COLUMNS)
def test_what_acts_inside_the_llm_runs_on_every_model(column):
    """It reads nothing that only some encoders have."""
    for name in vlmprune.methods():
        if method_class(name).place is not Place.BEFORE_LLM:
            assert way(name, column) == "works", name


def test_every_family_has_a_column():
    families = {zoo.CASES[case].reference().config.model_type for case, _ in COLUMNS.values()}
    assert families == set(vlmprune.models())
