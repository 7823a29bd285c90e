"""What a method declares is checked by `patch`: signals that are there in time, and cuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import vlmprune
from kit import zoo
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import (
    Attending,
    BeforeLLM,
    ClsAttention,
    Compressed,
    Compressing,
    Cut,
    Features,
    Hidden,
    InDecoder,
    Keys,
    MeanHidden,
    ModuleStep,
    Neurons,
    Place,
    ReceivedInLayer,
    Selection,
    Signal,
    TextAttention,
)
from vlmprune.prune.declared import check_declared
from vlmprune.prune.errors import MethodFieldError, MissingSignalError
from vlmprune.prune.registry import method_class

HALF = Budget("keep_ratio", 0.5)


@dataclass(frozen=True, kw_only=True)
class Before(BeforeLLM):
    """Declares what it is told to."""

    name: ClassVar[str] = "before"
    declared: Any = ()
    at: Any = (Cut(Place.BEFORE_LLM),)
    read: Any = None

    def needs(self, shape):
        return self.declared

    def cuts(self, shape):
        return self.at

    def select(self, tokens, keep):
        if self.read is not None:
            tokens.signals[self.read]
        return Selection(kept=torch.arange(keep))


@dataclass(frozen=True, kw_only=True)
class Inside(InDecoder):
    """Declares what it is told to."""

    name: ClassVar[str] = "inside"
    declared: Any = ()
    at: Any = (Cut(Place.DECODER, 2),)
    read: Any = None

    def needs(self, shape):
        return self.declared

    def cuts(self, shape):
        return self.at

    select = Before.select


@dataclass(frozen=True, kw_only=True)
class OnCache(Compressing):
    """Declares what it is told to."""

    name: ClassVar[str] = "on_cache"
    declared: Any = ()

    def needs(self, shape):
        return self.declared

    def compress(self, entries, keep):
        return Compressed(kept=torch.arange(keep))


@dataclass(frozen=True, kw_only=True)
class Looks(Attending):
    """Declares what it is told to."""

    name: ClassVar[str] = "looks"
    declared: Any = ()

    def needs(self, shape):
        return self.declared

    def attended(self, query, keys, valid, keep):
        return None


@dataclass(frozen=True)
class Unheard(Signal):
    """A signal that nobody reads."""


def step(layer: int, module: str = "mlp") -> ModuleStep:
    return ModuleStep(layer, module=module, read=lambda before, after: after[:, 0])


MISSING = {
    "no such encoder layer": (
        Before(declared=(ClsAttention(77),)),
        *("before", "ClsAttention(layer=77)", "layers 0 to 4, or -5 to -1"),
    ),
    "before the first": (Before(declared=(Keys(-6),)), "Keys(layer=-6)", "-5 to -1"),
    "no number": (Before(declared=(Keys("last"),)), "Keys(layer='last')", "0 to 4"),
    "no such decoder layer": (
        Inside(declared=(TextAttention(4),)),
        *("inside", "TextAttention(layer=4", "layers 0 to 3"),
    ),
    "a decoder layer from the end": (Inside(declared=(Hidden(-1),)), "Hidden", "layers 0 to 3"),
    "behind the cut": (
        Inside(declared=(TextAttention(3),)),
        *("lies behind its last cut", "at Cut(Place.DECODER, 2) layers 0 to 1 have run"),
    ),
    "of the cut layer, not ahead": (Inside(declared=(TextAttention(2),)), "ahead=True"),
    "a step of the cut layer": (Inside(declared=(step(2),)), "ModuleStep", "Cut(Place.DECODER, 2)"),
    "ahead of no cut": (
        Inside(declared=(TextAttention(1, ahead=True),)),
        *("only a layer that is cut can be read ahead: 2",),
    ),
    "the decoder's, before the LLM": (
        Before(declared=(TextAttention(1),)),
        *("is read in the decoder", "derive from InDecoder"),
    ),
    "the encoder's, in the decoder": (
        Inside(declared=(Features(),)),
        *("Features()", "is read before the LLM", "derive from BeforeLLM"),
    ),
    "of attention, on the cache": (
        OnCache(declared=(TextAttention(1),)),
        *("on_cache", "only ReceivedInLayer", "CacheEntries"),
    ),
    "of the encoder, on the cache": (OnCache(declared=(Features(),)), "only ReceivedInLayer"),
    "no such layer, on the cache": (OnCache(declared=(ReceivedInLayer(4),)), "layers 0 to 3"),
    "where all is given": (Looks(declared=(ReceivedInLayer(1),)), "looks", "return () from needs"),
    "an unknown signal": (
        Before(declared=(Unheard(),)),
        *("Unheard()", "none of the signals that can be read", "ClsAttention", "TextEmbeddings"),
    ),
    "a class": (Before(declared=(Features,)), "with brackets"),
    "no tuple": (Before(declared=Features()), "before.needs returned Features()", "a tuple"),
    "unknown rows": (Inside(declared=(TextAttention(1, rows="first"),)), "rows is 'last'"),
    "an unknown part": (Inside(declared=(MeanHidden(1, of="all"),)), "of is 'query'"),
    "an unknown module": (Inside(declared=(step(1, "ffn"),)), "module is 'attention' or 'mlp'"),
    "no function": (Inside(declared=(Neurons(1, read=None),)), "read is a function"),
}
CUTS = {
    "beyond the last layer": (
        Inside(at=(Cut(Place.DECODER, 4),)),
        "inside.cuts",
        "Cut(place=Place.DECODER, layer=4",
        "1 to 3",
    ),
    "negative": (Inside(at=(Cut(Place.DECODER, -1),)), "layer=-1", "1 to 3"),
    "half a layer": (Inside(at=(Cut(Place.DECODER, 1.5),)), "Cut(place=Place.DECODER, layer=1.5"),
    "descending": (
        Inside(at=(Cut(Place.DECODER, 3), Cut(Place.DECODER, 2))),
        "layers 3, 2",
        "ascend",
    ),
    "twice": (
        Inside(at=(Cut(Place.DECODER, 2), Cut(Place.DECODER, 2))),
        "layers 2, 2",
        "each once",
    ),
    "none": (Inside(at=()), "no cut"),
    "a number": (Inside(at=(2,)), "returned (2,)", "a tuple of Cut"),
    "a list": (Inside(at=[Cut(Place.DECODER, 2)]), "a tuple of Cut"),
    "before the LLM, of a decoder method": (
        Inside(at=(Cut(Place.BEFORE_LLM),)),
        "Cut(Place.DECODER",
        "another class",
    ),
    "in the decoder alone": (
        Before(at=(Cut(Place.DECODER, 2),)),
        "Cut(Place.BEFORE_LLM",
        "another class",
    ),
    "a share of nothing": (
        Inside(at=(Cut(Place.DECODER, 2, share=0.0),)),
        "share is a positive number",
    ),
    "unknown images": (
        Inside(at=(Cut(Place.DECODER, 2, images="all"),)),
        "'each', 'context', 'query'",
    ),
    "pooled before the LLM": (Before(at=(Cut(Place.BEFORE_LLM, 0, images="query"),)), "on its own"),
    "adaptive without a rule": (
        Inside(at=(Cut(Place.DECODER, 2, adaptive=True),)),
        "select_adaptive",
    ),
}


def refuse(error, made, *words: str) -> None:
    case = zoo.CASES["llava-clip-llama"]
    model = case.model()
    before = zoo.hooks(model)
    with pytest.raises(error) as caught:
        vlmprune.patch(model, MethodCall(made, HALF))
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert zoo.hooks(model) == before


@pytest.mark.parametrize("what", MISSING)
def test_signals_that_cannot_be_read_are_refused_by_patch(what):
    refuse(MissingSignalError, *MISSING[what])


@pytest.mark.parametrize("what", CUTS)
def test_cuts_that_cannot_be_made_are_refused_by_patch(what):
    refuse(MethodFieldError, *CUTS[what])


GOOD = [
    Before(declared=(ClsAttention(-1), ClsAttention(-5), Keys(4), Features())),
    Before(
        declared=(Features(), TextAttention(1)), at=(Cut(Place.BEFORE_LLM), Cut(Place.DECODER, 2))
    ),
    Inside(declared=(TextAttention(1), TextAttention(2, ahead=True), Hidden(2), MeanHidden(2))),
    Inside(declared=(TextAttention(0, rows=lambda v, t: t[:, 0] > 0), step(1, "attention"))),
    OnCache(declared=tuple(ReceivedInLayer(layer) for layer in range(4))),
]


@pytest.mark.parametrize("made", GOOD, ids=lambda made: type(made).__name__)
def test_what_is_there_is_taken_and_read(made):
    case = zoo.CASES["llava-clip-llama"]
    model = case.model()
    first = None if isinstance(made, Compressing) else made.declared[0]
    if first is not None:
        made = type(made)(**{**made.fields(), "read": first}) if made.at[0].layer else made
    with vlmprune.patch(model, MethodCall(made, HALF)) as handle:
        model(**case.inputs(zoo.BATCH))
    assert handle.last.pruned or handle.last.entries


@pytest.mark.parametrize("name", vlmprune.methods())
def test_shipped_methods_declare_what_is_there(name):
    """On every model for whose encoder they have a rule."""
    made, asked = method_class(name)(), 0
    for case in zoo.CASES.values():
        try:
            made.needs(case.shape)
        except vlmprune.VlmpruneError:
            continue
        check_declared(made, case.shape)
        asked += 1
    assert asked


@pytest.mark.parametrize(
    ("made", "given"),
    [
        (Before(declared=(ClsAttention(4),), read=ClsAttention(-1)), "ClsAttention(layer=4)"),
        (Before(read=Features()), "no signal"),
        (
            Inside(
                declared=(TextAttention(1), TextAttention(2)),
                at=(Cut(Place.DECODER, 2, share=1.5), Cut(Place.DECODER, 3)),
                read=TextAttention(2),
            ),
            "TextAttention(layer=1",
        ),
    ],
)
def test_a_signal_that_is_not_given_is_named_beside_those_that_are(made, given):
    case = zoo.CASES["llava-clip-llama"]
    model = case.model()
    vlmprune.patch(model, MethodCall(made, HALF))
    with pytest.raises(MissingSignalError) as caught:
        model(**case.inputs())
    assert f"{made.name} reads {made.read}" in str(caught.value)
    assert f"It is given: {given}" in str(caught.value)
