"""The tiny models and layouts that ship with the package (`eval/models`), as tests use them:
parametrized, and with what every method needs to run on them."""

# ruff: noqa: F401  (tests say zoo.BATCH)

from __future__ import annotations

import itertools
import os
import zlib
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import vlmprune
from kit.family_facts import OF_TESTS, fact
from vlmprune.eval.checking.cases import CASES
from vlmprune.eval.checking.tiny_clip import clip
from vlmprune.eval.models.tiny_layouts import (
    BATCH,
    DECODER,
    FIRST_WORD,
    FRAMES,
    IMAGE,
    MIXED,
    NONE,
    ONE,
    PAD,
    PATCH_GRIDS,
    PINPOINTS,
    PIXELS,
    SIDE,
    SINGLE,
    TOWER,
    TWO,
    VIDEO,
    VISION_END,
    VISION_START,
    VOCAB,
    Row,
    Tiles,
    encoder_inputs,
    images,
    is_visual,
    joined,
)
from vlmprune.eval.models.tiny_models import Case
from vlmprune.prune.budget import MethodCall
from vlmprune.prune.contract import Attending, CacheMethod, InEncoder, Place
from vlmprune.prune.registry import method_class

assert list(CASES) == [name for family in OF_TESTS.values() for name in family.CASES]
PROCESSORS = {family.CASES[0]: family for family in OF_TESTS.values()}
"""The family that has the real processor of a tiny model: of the first one of each family."""
FIRST = ("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl")
"""Families of which features and ways to call a model are asked, one model each."""
TWO_NAMES = ("llava-clip-llama", "qwen2_5_vl")
"""A family of each kind of positions: enough for what is one code path on all of them."""
EVERY_CELL = bool(os.environ.get("VLMPRUNE_EVERY_CELL"))
"""Whether every model is asked with every method that runs on it, which is for a release."""
THREE_NAMES = (*TWO_NAMES, "llava_next")
"""And one of tiles and newlines: these are asked with every method."""
SHARING_NAMES = ("llava-siglip-qwen2", "llava_onevision", "qwen3_vl")
"""An encoder without CLS token, pooled features, features that are added behind layers: these share
the methods between them."""
WHOLE_NAMES = tuple(name for name in CASES if name in THREE_NAMES + SHARING_NAMES)
"""Tiny models that are asked in every way, as between them they have every kind of encoder, layout
and positions. What another model has of its own is in its family's adapter, which one method of
each place shows (`asked`), and tests of what it computes (`ALL`)."""
WHOLE_CASES = tuple(CASES[name] for name in WHOLE_NAMES)
OTHER_CASES = tuple(case for case in CASES.values() if case not in WHOLE_CASES)
ALL = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
"""Every tiny model of every family: for tests of what an adapter says, once a model."""
STORING_CASES = tuple(c for c in CASES.values() if c.shape.decoder.attention_layers is None)
STORING = pytest.mark.parametrize("case", STORING_CASES, ids=lambda case: case.name)
"""Those all of whose layers have attention and a KV cache."""
WHOLE = pytest.mark.parametrize("case", WHOLE_CASES, ids=WHOLE_NAMES)
"""Those: for what no adapter has to do with."""
FAMILY_NAMES = tuple(OF_TESTS[family].ONE for family in FIRST if OF_TESTS[family].ONE)
"""One tiny model of each of the first families."""
CLIP = CASES[FAMILY_NAMES[0]].shape
GONE = OF_TESTS["llava_next"].GONE
SLIDING = OF_TESTS["llava"].SLIDING
FAMILIES = pytest.mark.parametrize(
    "case", [CASES[name] for name in FAMILY_NAMES], ids=lambda case: case.name
)
BOTH_FAMILIES = pytest.mark.parametrize(
    "case", [CASES[name] for name in TWO_NAMES], ids=lambda case: case.name
)


def by_turns(
    cases: Iterable[Case], words: Iterable[Any], whole: Iterable[str] = TWO_NAMES
) -> Iterator[tuple[Case, Any]]:
    """Every word on models of a family of each kind of positions (`whole`), and one by turns on
    each other: for what is one code path on all of them."""
    words = list(words)
    turns = itertools.cycle(words)
    for case in cases:
        for word in words if case.name in whole else [next(turns)]:
            yield case, word


def turn_of(case: Case) -> int:
    """A number of the model's name: which of several it takes stays as it is when others come."""
    return zlib.crc32(case.name.encode())


def asked(case: Case, names: Iterable[str]) -> list[str]:
    """The methods that a tiny model is asked with: all on `THREE_NAMES`, a third on each of
    `SHARING_NAMES`; on others one of each place, by turns, of those that run on it where any does.
    With `EVERY_CELL` all that run.
    """
    names = list(names)
    if not case.whole_cache:  # methods on it are refused
        names = [name for name in names if name.partition(":")[0] not in CLEARING + WEIGHING]
    if EVERY_CELL:
        return [name for name in names if options_for(case, name.partition(":")[0]) is not None]
    if case.name in SHARING_NAMES:
        return names[SHARING_NAMES.index(case.name) :: len(SHARING_NAMES)]
    if case not in OTHER_CASES:
        return names
    places: dict[Any, list[str]] = {}
    for name in names:
        cls = method_class(name.partition(":")[0])
        places.setdefault((cls.place, issubclass(cls, Attending)), []).append(name)
    found = []
    for of_place in places.values():
        run = [name for name in of_place if options_for(case, name.partition(":")[0]) is not None]
        found.append((run or of_place)[turn_of(case) % len(run or of_place)])
    return found


def asking(names: Iterable[str], cases: Iterable[Case] = tuple(CASES.values())) -> Any:
    """Parametrizes `case` and `name`: each of the models with the methods that it is asked with."""
    names = list(names)
    cells = [(case, name) for case in cases for name in asked(case, names)]
    return pytest.mark.parametrize(
        ("case", "name"), [pytest.param(*cell, id=f"{cell[1]}-{cell[0].name}") for cell in cells]
    )


def each(
    names: str | tuple[str, ...],
    values: Iterable[Any],
    cases: Iterable[Case] = tuple(CASES.values()),
) -> Any:
    """Parametrizes `case` and `names`: every value on the models of `WHOLE_NAMES`, and one by turns
    on every other."""
    values, own = list(values), (names,) if isinstance(names, str) else names
    cells = []
    for case in cases:
        turn = turn_of(case) % len(values)
        for value in [values[turn]] if case in OTHER_CASES else values:
            given = (value,) if isinstance(names, str) else value
            cells.append(pytest.param(case, *given, id="-".join(map(str, (*given, case.name)))))
    return pytest.mark.parametrize(("case", *own), cells)


def turns(name: str, words: Iterable[Any], cases: Iterable[Case] = tuple(CASES.values())) -> Any:
    """`by_turns` for parametrize, `name` being the argument that is a word."""
    cells = [pytest.param(*cell, id=f"{cell[1]}-{cell[0].name}") for cell in by_turns(cases, words)]
    return pytest.mark.parametrize(("case", name), cells)


CACHE = Place.CACHE
_ALL = vlmprune.methods()
ON_CACHE = [name for name in _ALL if issubclass(method_class(name), CacheMethod)]
IN_ENCODER = [name for name in _ALL if issubclass(method_class(name), InEncoder)]
CLEARING = [
    name
    for name in _ALL
    if name in ON_CACHE or any(cut.below for cut in method_class(name)().cuts(CLIP))
]
"""Methods that take entries out of the cache; those before a cut of every layer there."""
WEIGHING = [name for name in _ALL if getattr(method_class(name), "proportional", False)]
WEIGHING = [name for name in WEIGHING if method_class(name).place is Place.DECODER]
"""Methods in the decoder that add numbers to the logits of keys, which all later layers must
take."""
UNBUDGETED = [name for name in _ALL if method_class(name).unbudgeted]
"""Methods of which no budget says how many tokens stay."""
REMOVING = [name for name in _ALL if name not in ON_CACHE + IN_ENCODER + UNBUDGETED]
"""Methods before the LLM and in the decoder, which remove tokens from the sequence by a budget."""
METHODS = pytest.mark.parametrize("name", REMOVING)
CACHE_METHODS = pytest.mark.parametrize("name", ON_CACHE)
SMALL = {"token_select": {"n_init": 1, "n_local": 2}}
"""Fields of methods that do nothing to prompts as short as these, or refuse their budgets."""
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def budget(name: str, **words: float) -> dict[str, float]:
    """A budget for a method, if it takes any."""
    return {} if name in UNBUDGETED else words


def needs_of(case: Case, method: Any) -> tuple[Any, ...] | None:
    """The signals that a method asks for; None where it has no rule for the model's encoder, or
    cuts the caches of layers some of which have none."""
    forgets = method.name in CLEARING and method.name not in ON_CACHE
    if forgets and case.shape.decoder.attention_layers is not None:
        return None
    if method.name in WEIGHING and case.shape.decoder.attention_layers is not None:
        return None
    try:
        return tuple(method.needs(case.shape))
    except (vlmprune.MissingSignalError, vlmprune.UnsupportedModelError):
        return None


def lacks_signal(case: Case, call) -> bool:
    """Whether the method, as it is, asks for something that the model's encoder does not have."""
    needs = needs_of(case, call.method)
    return needs is None or any(case.shape.lacks(one) or one.of_text_twin for one in needs)


def options_for(case: Case, name: str) -> dict | None:
    """What `patch` needs beside the budget to run a method on a model: nothing; a field that
    replaces the CLS token by attention that every encoder has; the text encoder of the model's
    CLIP. None where the method cannot run."""
    cls = method_class(name)
    works = (f for f in ({}, cls.without_cls) if not lacks_signal(case, MethodCall(cls(**f), None)))
    found, needs = next(works, None), needs_of(case, cls())
    if found is None and needs is not None and not any(map(case.shape.lacks, needs)):
        return {"clip": clip()}
    return found


def hooks(model) -> list[tuple[int, int, int]]:
    """How many hooks and attributes each module has."""
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(vars(m))) for m in model.modules()
    ]


def patch_or_refusal(model, case: Case, name: str, **options):
    """The handle; or None where the method cannot run and was refused as it should be."""
    needed = options_for(case, name)
    if needed != {}:
        before = hooks(model)
        with pytest.raises(vlmprune.MissingSignalError) as refused:
            vlmprune.patch(model, name, **options)
        message = str(refused.value)
        if needed is None:
            others = set(vlmprune.methods()) - {name}
            assert any(other in message for other in others), f"names no other method: {message}"
        for option, value in (needed or {}).items():  # what would make it work
            word = f"{option}={value!r}" if isinstance(value, str) else f"{option}="
            assert word in message
        assert hooks(model) == before, "a refused patch left hooks"
    if needed is None:
        return None
    return vlmprune.patch(model, name, **needed, **options)
