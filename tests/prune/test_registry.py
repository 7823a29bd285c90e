"""Names of methods: found without importing them, unknown ones explained, collisions refused."""

import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch
from vlmprune.prune import registry
from vlmprune.prune.budget import Budget
from vlmprune.prune.contract import (
    Attending,
    BeforeLLM,
    CacheEntries,
    Compressed,
    Compressing,
    Cut,
    InDecoder,
    Method,
    ModelShape,
    Place,
    Selection,
    Signal,
    VisualTokens,
)
from vlmprune.prune.errors import BudgetError, MethodFieldError, UnknownMethodError
from vlmprune.prune.registry import method, method_class, method_names, register


@dataclass(frozen=True, kw_only=True)
class First(BeforeLLM):
    """Keeps the first tokens."""

    step: int = 1

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return ()

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return Selection(kept=torch.arange(keep))


@dataclass(frozen=True, kw_only=True)
class Other(First):
    """Another class."""


@pytest.fixture
def own_registry(monkeypatch):
    """A copy of the registry that the test may change."""
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    registry._plugins.cache_clear()
    yield registry._classes
    registry._plugins.cache_clear()


@pytest.mark.parametrize("name", method_names())
def test_every_name_leads_to_its_class(name):
    cls = method_class(name)
    assert issubclass(cls, Method)
    assert cls.name == name
    assert method_class(name) is cls


def test_names_are_found_without_importing_methods_or_transformers():
    code = """
import sys
from vlmprune.prune.registry import method_class, method_names
names = method_names()
folder = "vlmprune.prune.methods."
assert not [m for m in sys.modules if m.startswith(folder) and m.count(".") > 3], "imported"
method_class("divprune")
assert [m for m in sys.modules if m.startswith(folder) and m.count(".") > 3] == [
    folder + "before_llm.divprune"
]
for name in names:
    method_class(name)
assert "transformers" not in sys.modules
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(method_names())


@pytest.mark.parametrize(
    ("typed", "meant"), [("divprun", "divprune"), ("fast_v", "fastv"), ("vtccls", "vtc_cls")]
)
def test_unknown_method(typed, meant):
    with pytest.raises(UnknownMethodError) as caught:
        method(typed, keep_ratio=0.5)
    text = str(caught.value)
    assert text.startswith(f"Unknown method '{typed}'. Did you mean: {meant}")
    assert text.endswith(f"Available: {', '.join(method_names())}.")
    assert isinstance(caught.value, KeyError)


def test_unknown_method_far_from_all():
    with pytest.raises(UnknownMethodError, match=r"^Unknown method 'xyz'\. Available: "):
        method("xyz", keep_ratio=0.5)


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"layers": 2, "keep_ratio": 0.5}, "layer"),
        ({"keep_ration": 0.5}, "keep_ratio"),
        ({"keep_token": 5}, "keep_tokens"),
    ],
)
def test_unknown_field(fields, meant):
    with pytest.raises(MethodFieldError, match=f"fastv has no field.*Did you mean: {meant}"):
        method("fastv", **fields)


def test_fields_and_budget_are_told_apart():
    call = method("fastv", layer=3, keep_tokens=64, keep_ratio=None)
    assert call.name == "fastv"
    assert call.method == method_class("fastv")(layer=3)
    assert call.budget == Budget("keep_tokens", 64)
    assert str(call) == "fastv(keep_tokens=64)"
    assert call == method("fastv", layer=3, keep_tokens=64)


def test_own_method(own_registry):
    assert register("first_tokens")(First) is First
    assert "first_tokens" in method_names()
    call = method("first_tokens", keep_tokens=2, step=3)
    assert call.method == First(step=3)
    assert call.name == "first_tokens"
    register("first_tokens")(First)  # the same class again, as when a module is reloaded


def test_two_classes_of_one_name(own_registry):
    register("first_tokens")(First)
    with pytest.raises(ValueError, match=r"'first_tokens' is taken by .*Other under another name"):
        register("first_tokens")(Other)
    assert method_class("first_tokens") is First


@pytest.mark.parametrize("imported", [True, False])
def test_a_shipped_name_is_taken(own_registry, imported):
    method_class("divprune")
    if not imported:
        del own_registry["divprune"]
    with pytest.raises(ValueError, match=r"'divprune' is taken by vlmprune\.prune\.methods\."):
        register("divprune")(Other)


@pytest.mark.parametrize("thing", [dict, type("NoDataclass", (), {})])
def test_only_methods_can_be_registered(own_registry, thing):
    with pytest.raises(TypeError, match="derive a frozen dataclass from Method"):
        register("thing")(thing)
    assert "thing" not in method_names()


def test_entry_point(own_registry, monkeypatch, tmp_path):
    """A method of another distribution: listed without an import, loaded when it is asked for."""
    (tmp_path / "somebodys_methods.py").write_text(
        "from dataclasses import dataclass\n"
        "from vlmprune.prune.registry import method_class\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Theirs(method_class('fastv')):\n"
        "    '''A FastV of another depth.'''\n"
        "    layer: int = 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    asked = []

    def entry_points(*, group):
        asked.append(group)
        return [EntryPoint("theirs", "somebodys_methods:Theirs", group)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert "theirs" in method_names()
    assert "somebodys_methods" not in sys.modules
    call = method("theirs", keep_tokens=3)
    assert type(call.method).__module__ == "somebodys_methods"
    assert call.name == "theirs"
    assert call.method.fields() == {"layer": 5}
    assert method("fastv", keep_tokens=3).name == "fastv"
    assert asked == ["vlmprune.methods"]
    monkeypatch.delitem(sys.modules, "somebodys_methods")


def test_a_method_that_derives_from_no_place_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Bare(Method):
        place: ClassVar[Place] = Place.BEFORE_LLM

        def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
            return ()

        def select(self, tokens: VisualTokens, keep: int) -> Selection:
            raise NotImplementedError

    places = "InEncoder, BeforeLLM, InDecoder, Compressing, Attending"
    with pytest.raises(TypeError, match=f"derive it from one of {places}"):
        register("bare")(Bare)


@dataclass(frozen=True, kw_only=True)
class Newest(Compressing):
    """Keeps the last entries."""

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return ()

    def compress(self, entries: CacheEntries, keep: int) -> Compressed:
        stored = len(entries.visual)
        return Compressed(kept=torch.arange(stored - keep, stored))


@dataclass(frozen=True, kw_only=True)
class Everything(Attending):
    """Attends to all entries."""

    def attended(self, query, keys, valid, keep):
        return None


@dataclass(frozen=True, kw_only=True)
class Deep(InDecoder):
    """Keeps the first tokens, from the middle of the decoder on."""

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return ()

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        return (Cut(Place.DECODER, shape.decoder.num_layers // 2),)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        return Selection(kept=torch.arange(keep))


@pytest.mark.parametrize(
    ("cls", "place", "needs_budget"),
    [
        (First, Place.BEFORE_LLM, True),
        (Deep, Place.DECODER, True),
        (Newest, Place.CACHE, True),
        (Everything, Place.CACHE, False),
    ],
)
def test_own_methods_of_every_place(own_registry, cls, place, needs_budget):
    register("own")(cls)
    call = method("own", keep_tokens=4)
    assert call.method == cls() and call.method.places == (place,)
    if needs_budget:
        with pytest.raises(BudgetError, match="own needs a budget"):
            method("own")
    else:
        assert method("own").budget is None


FOLDERS = {
    "encoder": Place.ENCODER,
    "before_llm": Place.BEFORE_LLM,
    "decoder": Place.DECODER,
    "cache": Place.CACHE,
}


@pytest.mark.parametrize("name", method_names())
def test_a_method_lies_in_the_folder_of_the_place_where_it_first_acts(name):
    cls = method_class(name)
    assert cls().place is cls().places[0] is FOLDERS[cls.__module__.split(".")[-2]]


@pytest.mark.parametrize("word", ["fastv:layer=3@0.2", "divprune@64", "divprune+fastv"])
def test_a_word_of_the_command_line_is_told_apart(word):
    with pytest.raises(UnknownMethodError, match=r"keywords: .*layer=3, keep_ratio=0\.25.* a list"):
        method(word, keep_ratio=0.5)
