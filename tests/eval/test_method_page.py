"""`vlmprune methods NAME`: everything that a method's file says, its fields, budgets and models."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from kit.support import EXPECTED
from vlmprune.eval import cli
from vlmprune.eval.commands.method_page import _meaning, method_page
from vlmprune.eval.models.support import support
from vlmprune.prune import registry
from vlmprune.prune.contract import BeforeLLM, Features, Selection
from vlmprune.prune.registry import method_class

COLUMN = {"llava": "llava (CLIP)"}
"""Of families whose column in the table of support has another name."""
SHARED_KEYS = "layers of this model read keys that"
"""Of published sizes, in front of which layers a cut is too deep."""


def page_of(name: str, capsys) -> str:
    assert cli.main(["methods", name]) == 0
    return capsys.readouterr().out


def test_a_page_says_what_the_file_says(capsys):
    page = page_of("fastv", capsys)
    lines = page.splitlines()
    assert lines[0].startswith("fastv: after an early decoder layer, keep the visual tokens")
    assert max(map(len, lines)) <= 100
    for fact in (
        "  Acts        in the LLM decoder",
        "  Reads       in the decoder: text attention",
        "  Budgets     keep_ratio, keep_tokens, average_tokens, flops_ratio; one is needed",
        "  Positions   original by default",
        "              https://arxiv.org/abs/2403.06764",
        "  Defined in  vlmprune.prune.methods.decoder.fastv",
        "  layer: int = 2",
        "  Not tried   glm46v, qwen2_vl: no sizes of a checkpoint are known here",
    ):
        assert any(line.startswith(fact) for line in lines), fact
    said = " ".join(page.split())
    assert "Reference An Image is Worth 1/2 Tokens After Layer 2" in said
    assert (
        "Upstream pkunlp-icler/FastV" in said and "d1659729b5bf1be225e99ee15783deeea80f63b1" in said
    )
    assert "Differs every image of every sample has its own ranking" in said
    assert "layer is the first decoder layer that sees fewer tokens" in said


def test_allowed_values_budgets_and_refusals(capsys):
    said = " ".join(page_of("vtc_cls", capsys).split())
    assert "scores: 'cls' or 'received' = 'cls'" in said
    assert "newlines: 'drop' or 'keep' or None = None" in said
    works, _, refuses = said.partition(" Works on ")[2].partition(" Refuses ")
    assert "llava (llava-1.5-7b), llava_next (llava-next-7b)" in works
    assert "llava_onevision (llava-onevision-7b), " in refuses and " qwen2_5_vl (" in refuses
    assert (
        "Set scores='received' to use the mean attention that each token receives instead." in said
    )
    assert "use a method that works on it" not in said
    said = " ".join(page_of("token_select", capsys).split())
    assert "Budgets keep_ratio, keep_tokens; or none: as published" in said


@pytest.mark.parametrize("name", EXPECTED)
def test_every_field_has_a_meaning(name):
    cls = method_class(name)
    meanings = {field.name: _meaning(cls, field.name) for field in dataclasses.fields(cls)}
    assert all(meanings.values()), meanings


@pytest.mark.parametrize("name", EXPECTED)
def test_models_are_those_that_the_tests_know(name):
    reasons = {kind: reason for kind, (_, reason) in support(name).items()}
    deep = {kind for kind, reason in reasons.items() if reason and SHARED_KEYS in reason}
    assert deep <= {"gemma4"}  # the tiny model shares none
    runs = {kind: reason is None for kind, reason in reasons.items() if kind not in deep}
    assert runs == {kind: EXPECTED[name][COLUMN.get(kind, kind)] == "works" for kind in runs}


def test_an_unknown_name_says_what_is_near(capsys):
    assert cli.main(["methods", "fastw"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "Did you mean: fastv" in line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(BeforeLLM):
    """The first tokens, `step` apart."""

    step: int = 1
    ways: tuple[str, ...] = dataclasses.field(default=("a",))

    def needs(self, shape):
        return (Features(),)

    def select(self, tokens, keep):
        return Selection(kept=tokens.signals[Features()].new_ones(keep).cumsum(0).long() - 1)


@pytest.fixture
def mine(monkeypatch):
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    return registry.register("mine")(Mine)


def test_a_method_of_ones_own_has_a_page(mine, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__doc__", "Mine: keep the first.\n\nDiffers: no.")
    said = " ".join(method_page("mine", 90).split())
    assert said.startswith("mine: ") and " Acts before the LLM Reads features " in said
    assert "Differs no." in said and "Reference" not in said
    assert "step: int = 1 The first tokens, step apart." in said
    assert "ways: tuple[str, ...] = ('a',)" in said
    works = said.partition(" Works on ")[2]
    assert "llava (llava-1.5-7b), llava_next (llava-next-7b), " in works
    assert "llava_onevision (llava-onevision-7b)" in works


def test_a_method_that_cannot_be_patched_says_why(mine, monkeypatch):
    monkeypatch.setattr(Mine, "needs", lambda self, shape: 1 / (shape.tower.num_layers == 24))
    found = support("mine")
    assert found["llava"][1] is not None and "ZeroDivisionError" in found["qwen3_vl"][1]
