"""ERRORS.md: what the docstring of every error says, and a message of each from the front door."""

from __future__ import annotations

import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import vlmprune
from kit.paths import ROOT
from vlmprune.eval import embedded

PARTS = ("Symptom", "Cause", "Type", "Page")
EXAMPLES = {
    "BudgetError": 'vlmprune.patch(model, "fastv", keep_ratio=0.5, keep_tokens=64)',
    "UnknownMethodError": 'vlmprune.patch(model, "divprun", keep_ratio=0.5)',
    "PluginError": """\
from vlmprune.eval.importing import import_methods

import_methods("mine.py")""",
    "MethodFieldError": 'vlmprune.patch(model, "fastv", keep_ratio=0.5, layers=2)',
    "MethodAnswerError": """\
@register("greedy")
@dataclass(frozen=True, kw_only=True)
class Greedy(BeforeLLM):
    def needs(self, shape):
        return ()

    def select(self, tokens, keep):
        return Selection(kept=torch.arange(tokens.num_tokens))


vlmprune.patch(model, "greedy", keep_ratio=0.5)
model(**inputs)""",
    "UnsupportedModelError": 'vlmprune.patch(torch.nn.Linear(2, 2), "divprune", keep_ratio=0.5)',
    "MissingSignalError": 'vlmprune.patch(model, "cdpruner", keep_ratio=0.5)',
    "UnsupportedFeatureError": """\
vlmprune.patch(model, "divprune", keep_ratio=0.5)
model.generate(**inputs, prefill_chunk_size=64)""",
    "NothingToShowError": """\
handle = vlmprune.patch(model, "divprune", keep_ratio=0.5)
model(**inputs)
handle.overlay(image, index=1)""",
    "NotRecordedError": """\
handle = vlmprune.patch(model, "divprune", keep_ratio=0.5)
model(**inputs)
handle.last.scores""",
}
"""What raises an error, beside a model, the inputs of one question and its picture."""


def errors() -> list[type[vlmprune.VlmpruneError]]:
    """Those of the front door in the order of their file, then all others by name."""
    return _in_file(ROOT / "prune" / "errors.py") + sorted(
        (error for file in (ROOT / "eval").rglob("*.py") for error in _in_file(file)),
        key=lambda error: error.__name__,
    )


def _in_file(file: Path) -> list[type[vlmprune.VlmpruneError]]:
    found = []
    for name in re.findall(r"^class (\w+)\(\w*Error\b", file.read_text("utf-8"), re.M):
        inside = file.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join(("vlmprune", *inside)).removesuffix(".__init__"))
        error = getattr(module, name)
        if issubclass(error, vlmprune.VlmpruneError) and error is not vlmprune.VlmpruneError:
            found.append(error)
    return found


def parts(error: type[vlmprune.VlmpruneError]) -> dict[str, str]:
    """What its docstring says: the sentence, and each of `PARTS`."""
    said = inspect.cleandoc(error.__doc__ or "")
    named = re.findall(rf"^({'|'.join(PARTS)}): (.*(?:\n {{4}}.*)*)", said, re.M)
    sentence = " ".join(said.partition("\n\n")[0].split())
    return {"": sentence} | {name: " ".join(text.split()) for name, text in named}


def example(name: str) -> str:
    """The message that the example really brings."""
    model, processor = embedded.load_model()
    question = embedded.questions(1)[0]
    text = embedded.prompt(processor, question.question)
    names: dict[str, Any] = {}
    exec(
        "import torch, vlmprune\nfrom dataclasses import dataclass\n"
        "from vlmprune.prune.contract import BeforeLLM, Selection\n"
        "from vlmprune.prune.registry import register, _classes",
        names,
    )
    names |= {
        "model": model,
        "image": question.image,
        "inputs": processor(images=question.image, text=text, return_tensors="pt"),
    }
    try:
        exec(EXAMPLES[name], names)
    except vlmprune.VlmpruneError as error:
        assert type(error).__name__ == name, error
        return f"{name}: {error}"
    finally:
        names["_classes"].pop("greedy", None)
    raise AssertionError(f"{name}: nothing was raised")


def error_page() -> str:
    """Every error as Markdown."""
    return "\n\n".join(_entry(error) for error in errors())


def _entry(error: type[vlmprune.VlmpruneError]) -> str:
    name, said = error.__name__, parts(error)
    builtin = next(base for base in error.__mro__ if base.__module__ == "builtins")
    lines = [f"### {name}", "", *_wrapped(f"{said['']} Also a `{builtin.__name__}`."), ""]
    for part in PARTS[:-1]:
        lines += _wrapped(f"- **{part}**: {said[part]}", "  ")
    if name in EXAMPLES:
        lines += ["", "```python", EXAMPLES[name], "```", "", "```text"]
        lines += [*_wrapped(example(name)), "```"]
    return "\n".join(lines)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text, 100, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
