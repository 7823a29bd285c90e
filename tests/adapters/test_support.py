"""Which method runs on which model, found by running it, beside what support.json expects.

The expectation is data, so that a method that begins to refuse a model is a red test. After a
deliberate change `PYTHONPATH=tests python tests/adapters/test_support.py --write` runs every method
on every model and stores what was found.
"""

from __future__ import annotations

import functools
import json
import sys

import pytest
import torch
import vlmprune
from kit import zoo
from kit.support import EXPECTED, EXPECTED_FILE
from vlmprune.adapters.checks.working import working
from vlmprune.adapters.family import VIDEO
from vlmprune.adapters.registry import family_class, family_of
from vlmprune.eval.checking.tiny_clip import clip
from vlmprune.eval.commands.models import models_table
from vlmprune.prune.contract import Place
from vlmprune.prune.registry import method_class


def _columns() -> dict[str, tuple[str, zoo.Row]]:
    """A model of every family with an image, and with a video where the family is asked for what
    others share."""
    columns: dict[str, tuple[str, zoo.Row]] = {}
    for name, family in zoo.OF_TESTS.items():
        for label, case in getattr(family, "COLUMNS", {name: family.CASES[0]}).items():
            columns[label] = (case, (7, "A", 3))
            if family.ONE and VIDEO in family_class(name).modalities:
                columns[f"{label}, video"] = (case, (7, "V", 3))
    return columns


COLUMNS = _columns()
WAYS: dict[str, dict[str, object]] = {
    "works": {},
    "`scores='received'`": {"scores": "received"},
    "`pivot='received'`": {"pivot": "received"},
    "`clip=`": {"clip": True},
    "`relevance='prompt'`": {"relevance": "prompt"},
}
METHODS = vlmprune.methods()
_table = functools.cache(models_table)
REFUSALS = (
    vlmprune.MissingSignalError,
    vlmprune.MethodFieldError,
    vlmprune.UnsupportedModelError,
)


@functools.cache
def column_of(column: str):
    """The model of a column, which all methods come and go on, and what it is asked."""
    name, row = COLUMNS[column]
    return zoo.CASES[name], row, zoo.CASES[name].model(), zoo.CASES[name].inputs((row,))


@functools.cache
def way(name: str, column: str) -> str:
    """The first of `WAYS` in which a method keeps 40 % of an image's tokens, or of their entries in
    the cache, or none where it takes no budget; "no" if no way does.

    Anything but a typed refusal is a failure of the caller's test. A method that takes an image of
    a model takes its videos, which are the same rows by then: those that the model is asked with
    (`zoo.asked`) are run on them, and those inside the encoder, which see more of a video.
    """
    case, row, model, inputs = column_of(column)
    is_run = row[1] != "V" or name in zoo.IN_ENCODER or name in zoo.asked(case, METHODS)
    for words, options in WAYS.items():
        given = options | zoo.SMALL.get(name, {})
        if given.pop("clip", None):
            given["clip"] = clip()
        try:
            handle = vlmprune.patch(model, name, **zoo.budget(name, keep_ratio=0.4), **given)
        except REFUSALS:
            continue
        if not is_run:
            handle.remove()
            return words
        try:
            with torch.no_grad(), handle:
                model(**inputs)
        except vlmprune.UnsupportedFeatureError:
            assert name in zoo.IN_ENCODER, "only pictures that are resampled are refused so late"
            continue
        (count,) = case.counts((row,))
        kept = 0 if name in zoo.UNBUDGETED else round(0.4 * count)
        all_stay = name in zoo.ON_CACHE or getattr(method_class(name), "restores", False)
        assert handle.last.tokens_kept == [count if all_stay else kept], (name, column)
        for layer, (entries,) in enumerate(handle.last.entries):
            stores = layer in case.shape.decoder.attending
            assert entries.shape[-1] == stores * (handle.last.text_tokens[0] + kept)
        return words
    return "no"


def found() -> dict[str, dict[str, str]]:
    return {name: {c: way(name, c) for c in COLUMNS} for name in METHODS}


@pytest.mark.parametrize("column", COLUMNS)
def test_methods_run_or_refuse_as_expected(column):
    expected = {name: EXPECTED[name][column] for name in METHODS}
    assert {name: way(name, column) for name in METHODS} == expected


def test_every_method_and_no_other_is_expected():
    assert list(EXPECTED) == METHODS


@pytest.mark.parametrize("column", COLUMNS)
def test_what_acts_inside_the_llm_runs_on_every_model(column):
    """It reads nothing that only some encoders have; what some decoder layers lack is refused."""
    case = zoo.CASES[COLUMNS[column][0]]
    for name in METHODS:
        if (cls := method_class(name)).place > Place.BEFORE_LLM:
            needs = zoo.needs_of(case, cls())
            lacks = needs is None or any(map(case.shape.lacks, needs))
            lacks |= name in zoo.CLEARING + zoo.WEIGHING and not case.whole_cache
            assert way(name, column) == ("no" if lacks else "works"), name


@pytest.mark.parametrize("column", [name for name in COLUMNS if not name.endswith(", video")])
def test_refusals_name_the_methods_that_work_and_no_others(column):
    family = family_of(zoo.CASES[COLUMNS[column][0]].reference())
    assert working(family) == [name for name in METHODS if EXPECTED[name][column] == "works"]


@pytest.mark.parametrize("name", zoo.OF_TESTS)
def test_the_table_of_models_says_at_which_places_methods_work(name):
    first = next(iter(getattr(zoo.OF_TESTS[name], "COLUMNS", {name: None})))
    works = {
        method_class(method).place for method, columns in EXPECTED.items() if columns[first] != "no"
    }
    table = _table()
    (row,) = [row for row in table.rows if row[0] == name]
    cells = dict(zip(table.headers, row, strict=True))
    assert (cells["In the encoder"] == "yes") == (Place.ENCODER in works)
    assert (cells["On the cache"] == "yes") == (Place.CACHE in works)


def test_every_family_has_a_column():
    families = {zoo.CASES[case].reference().config.model_type for case, _ in COLUMNS.values()}
    assert families == set(vlmprune.models())


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: PYTHONPATH=tests python tests/adapters/test_support.py --write")
    zoo.EVERY_CELL = True  # what is stored was seen
    EXPECTED_FILE.write_text(json.dumps(found(), indent=1) + "\n")
