"""What every method selects on every tiny model, index for index, and what is generated then:
stored, so that a change of the inside is compared with what was there before.

    python tests/kit/selections.py           what differs, exit status 1
    python tests/kit/selections.py --write   store what is selected now

The store says nothing about what is right (the oracle and the golden files do), only what was.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import vlmprune
from vlmprune.eval.checking.cases import CASES
from vlmprune.eval.checking.tiny_clip import clip
from vlmprune.eval.models.tiny_layouts import BATCH, SINGLE
from vlmprune.eval.models.tiny_models import Case

STORE = Path(__file__).parent.parent / "data" / "selections.json"
MODELS = (
    "llava-clip-llama",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
)
"""One of each of the first families."""
CELLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "one image, keep_tokens=9": (SINGLE, {"keep_tokens": 9}),
    "one image, no budget": (SINGLE, {}),
    "batch, keep_ratio=0.4": (BATCH, {"keep_ratio": 0.4}),
}
"""Prompts and budget. The batch: two images of different sizes, one image, and none."""
LEFT_OUT = {("token_select", "llava_next", "one image, keep_tokens=9")}
"""Near-ties: the words generated there differ between processors."""
HELP: tuple[dict[str, Any], ...] = ({}, {"scores": "received"}, {"pivot": "received"})
"""Fields with which a method runs on an encoder without CLS token; the first that works."""
SMALL: dict[str, dict[str, Any]] = {"token_select": {"n_init": 1, "n_local": 2}}
"""Fields of methods that refuse the budgets of prompts as short as these."""
NEW_TOKENS = 3


def compact(value: Any) -> Any:
    """Whole numbers as runs, "0-3 7 7 9" (-1 is "x"); lists of lists as lists of these."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return value
    if not value or not all(isinstance(x, int) for x in value):
        return [compact(x) for x in value] if value else ""
    runs = groupby(enumerate(value), lambda pair: pair[1] - pair[0])
    spans = [[x for _, x in run] for _, run in runs]
    return " ".join(_span(span[0], span[-1]) for span in spans)


def _span(first: int, last: int) -> str:
    word = "x" if first == -1 else str(first)
    return word if first == last else f"{word}-{last}"


def place_of(stage: Any) -> str:
    """Where a stage is, in words: all that is read of places here."""
    return stage.where


def reported(last: Any) -> dict[str, Any]:
    """Of what `handle.last` says all that is whole numbers and words."""
    said = {
        "kept": last.kept,
        "order": last.order,
        "groups": last.groups,
        "rows": last.tokens_kept,
        "positions": last.positions,
        "layers": last.tokens_per_layer,
        "entries": last.entries,
        "stages": [
            [stage.method, place_of(stage), stage.positions]
            + [compact(x) for x in (stage.kept, stage.order, stage.groups)]
            for stage in last.stages
        ],
        "note": last.note,
    }
    return {key: compact(value) for key, value in said.items() if _says(value)}


def _says(value: Any) -> bool:
    """Whether there is anything in it but None."""
    if isinstance(value, list):
        return any(map(_says, value))
    return value is not None


def selected(model: Any, inputs: dict[str, Any], method: str, budget: dict[str, Any]) -> Any:
    """What a method selects and the model generates; the name of the error that refuses it."""
    refusal, fields = "", SMALL.get(method, {}) | budget
    for help_ in (*HELP, {"clip": clip()}):
        try:
            with vlmprune.patch(model, method, **fields, **help_) as handle, torch.no_grad():
                out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
                new = out[:, inputs["input_ids"].shape[1] :]
                return reported(handle.last) | {"generated": [compact(row) for row in new]}
        except vlmprune.MissingSignalError as error:
            refusal = refusal or type(error).__name__
        except vlmprune.VlmpruneError as error:
            if not refusal:
                return type(error).__name__
    return refusal


def inputs_of(case: Case, rows: Any) -> dict[str, Any]:
    """A case's inputs, with pixels that are the same bits wherever they are drawn: `random` is
    seeded by them."""
    found = case.inputs(rows)
    return found | {"pixel_values": found["pixel_values"].mul(16).round().div(16)}


@cache
def model_of(name: str) -> Any:
    """On which all methods come and go."""
    return CASES[name].model()


def of_method(method: str, models: Iterable[str] = MODELS) -> dict[str, Any]:
    """What a method selects in every cell of these models: "MODEL, PROMPTS, BUDGET" -> it."""
    found = {}
    for name in models:
        for cell, (rows, budget) in CELLS.items():
            if (method, name, cell) not in LEFT_OUT:
                inputs = inputs_of(CASES[name], rows)
                found[f"{name}, {cell}"] = selected(model_of(name), inputs, method, budget)
    return json.loads(json.dumps(found))


def stored() -> dict[str, dict[str, Any]]:
    """Method -> what `of_method` said when the store was written."""
    return json.loads(STORE.read_text())


def written(selections: dict[str, dict[str, Any]]) -> str:
    """The store as text: a line for every cell, so that a diff names it."""
    methods = []
    for method, cells in selections.items():
        lines = (
            f"  {json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in cells.items()
        )
        methods.append(f"{json.dumps(method)}: {{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(methods) + "\n}\n"


def differences(then: Any, now: Any, where: str = "") -> Iterator[str]:
    """A line for everything that is not as it was."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*then, *now]):
            yield from differences(then.get(key), now.get(key), f"{where}{key}: ")
    elif then != now:
        yield f"{where}was {then!r}, is {now!r}"


def main(arguments: list[str]) -> int:
    now = {method: of_method(method) for method in vlmprune.methods()}
    if arguments == ["--write"]:
        STORE.write_text(written(now))
        return 0
    lines = list(differences(stored(), now))
    sys.stdout.writelines(f"{line}\n" for line in lines)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
