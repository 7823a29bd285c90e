"""`check-method` says what a method breaks; `new-method` writes one that breaks nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import vlmprune
import yaml
from vlmprune.eval.checking import properties
from vlmprune.eval.checking.asked import copied, same
from vlmprune.eval.cli import main
from vlmprune.eval.commands.new_method import write_method
from vlmprune.eval.in_process import sweep_model
from vlmprune.prune import registry
from vlmprune.prune.contract import (
    BeforeLLM,
    ClsAttention,
    Cut,
    Features,
    InDecoder,
    Neurons,
    Place,
    Selection,
)
from vlmprune.prune.ops.topk import ascending, top_k
from vlmprune.prune.registry import default_methods

pytestmark = pytest.mark.usefixtures("timed_once")

ONE = ["llava_next"]


@pytest.fixture
def own_registry(monkeypatch):
    """A registry that the test may change, and no modules of its files left behind."""
    default_methods()
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if not name.startswith(("vlmprune", "transformers", "torch")):
            del sys.modules[name]


@dataclass(frozen=True, kw_only=True)
class Norm(BeforeLLM):
    """The tokens of largest norm."""

    name: ClassVar[str] = "norm"

    def needs(self, shape):
        return (Features(),)

    def select(self, tokens, keep):
        return Selection(kept=ascending(top_k(tokens.signals[Features()].norm(dim=-1), keep)))


class Twice(Norm):
    def select(self, tokens, keep):
        return Selection(kept=torch.zeros(keep, dtype=torch.long))


class Random(Norm):
    def select(self, tokens, keep):
        return Selection(kept=torch.randperm(tokens.num_tokens)[:keep].sort().values)


class ByPlace(Norm):
    def select_batch(self, asked):
        return [Selection(kept=torch.arange(keep) + (i > 0)) for i, (_, keep) in enumerate(asked)]


class InPlace(Norm):
    def select(self, tokens, keep):
        tokens.signals[Features()].mul_(2)
        return super().select(tokens, keep)


class Waits(Norm):
    def select(self, tokens, keep):
        assert tokens.signals[Features()].sum().item() != 7
        return super().select(tokens, keep)


class SaysSo(Waits):
    waits = "it is unlucky"


@dataclass(frozen=True, kw_only=True)
class Anew(InDecoder):
    """A function made anew is another signal."""

    name: ClassVar[str] = "anew"

    def needs(self, shape):
        return (Neurons(1, read=lambda visual, text: visual[:, 0]),)

    def cuts(self, shape):
        return (Cut(Place.DECODER, 2),)

    def select(self, tokens, keep):
        return Selection(kept=torch.arange(keep))


@dataclass(frozen=True, kw_only=True)
class Cls(Norm):
    """Reads what not every encoder has."""

    layer: int = -1

    def needs(self, shape):
        return (ClsAttention(self.layer),)

    def select(self, tokens, keep):
        return Selection(kept=torch.arange(keep))


def states(method, layouts=ONE) -> dict[str, tuple[str, str]]:
    return {f.property: (f.state, f.reason) for f in vlmprune.check_method(method, layouts)}


def failing(method) -> dict[str, str]:
    return {name: reason for name, (state, reason) in states(method).items() if state == "FAIL"}


def test_a_method_that_breaks_nothing():
    found = states(Norm())
    assert not failing(Norm())
    assert found["as published"] == ("n/a", "it needs a budget")
    assert found["one by one"] == ("n/a", "it answers one by one")
    assert found["whole rows"][0] == "n/a"
    assert [s for s, _ in found.values()].count("pass") == len(properties.PROPERTIES) - 3


@pytest.mark.parametrize(
    ("method", "broken", "word"),
    [
        (Twice(), "valid answers", "0 twice"),
        (Random(), "deterministic", "differ"),
        (Random(), "pure", "in two ways"),
        (ByPlace(), "alone as in a batch", "others are kept in a batch"),
        (ByPlace(), "one by one", "keeps others"),
        (InPlace(), "pure", "changes the tensors"),
        (Waits(), "no host wait", "waits for the device"),
        (Anew(), "declared", "other signals every time"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BeforeLLM | InDecoder) else value,
)
def test_what_a_method_breaks_is_found(method, broken, word):
    assert word in failing(method)[broken]


def test_a_wrong_answer_is_told_once():
    found = states(Twice())
    assert list(failing(Twice())) == ["valid answers"]
    assert found["valid answers"][1].startswith("norm.select returned kept with 0 twice")
    assert found["exact counts"] == ("n/a", "an answer is not valid")


def test_a_wait_that_is_declared_is_said():
    assert states(SaysSo())["no host wait"] == ("n/a", "it says that it waits: it is unlucky")


def test_layouts_without_a_signal_are_not_applicable_and_wrong_layers_fail():
    (found,) = vlmprune.check_method(Cls(), ["llava-siglip-qwen2"])
    assert (found.property, found.state) == ("all", "n/a") and "CLS" in found.reason
    (found,) = vlmprune.check_method(Cls(layer=22), ONE)
    assert (found.property, found.state) == ("all", "FAIL") and "layers 0 to 4" in found.reason


def test_a_patch_that_changes_the_model_is_found(monkeypatch):
    """No method can: it is the library that is tested by these properties."""
    whole = properties.patch

    def patch(model, *args, **kwargs):
        model.lm_head.register_forward_hook(lambda module, given, output: output * 1.5)
        return whole(model, *args, **kwargs)

    monkeypatch.setattr(properties, "patch", patch)
    found = failing(Norm())
    assert "differ by up to" in found["identity"] and "hooks" in found["undo"]


@pytest.mark.parametrize(
    "name", ["prumerge", "fastv", "visual_press", "token_select:n_init=1:n_local=2", "cdpruner"]
)
def test_shipped_methods_break_nothing(name):
    assert not failing(name)


def test_copies_are_equal_until_they_change():
    one = Selection(kept=torch.arange(3), features=torch.tensor([[float("nan"), 1.0]]))
    two = copied(one)
    assert same(one, two)
    two.features[0, 1] = 2
    assert not same(one, two) and one.features[0, 1] == 1


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        (("fastv+divprune", ONE), "more than one"),
        (("fastv@0.5", ONE), "without a budget"),
        (("fastv", ["llava"]), "Unknown layout 'llava'"),
        ((Anew.__mro__[1], ONE), "has no name"),
    ],
)
def test_what_cannot_be_checked_is_refused(asked, word):
    with pytest.raises(vlmprune.MethodFieldError, match=word):
        vlmprune.check_method(*asked)


class NotIterable(Norm):
    def needs(self, shape):
        return Features()


class Misspelt(Norm):
    def needs(self, shape):
        return (ClsAttention(layers=3),)


class Raises(Norm):
    def select(self, tokens, keep):
        return tokens.feature


@pytest.mark.parametrize(
    ("cls", "property", "words"),
    [
        (NotIterable, "all", ("needs returned Features()", "return a tuple of signals")),
        (Misspelt, "all", ("keyword argument 'layers'", "(test_checking.py, line ")),
        (Raises, "valid answers", ("no attribute 'feature'", "(test_checking.py, line ")),
    ],
)
def test_what_raises_is_found_and_where(cls, property, words):
    found = {f.property: f for f in vlmprune.check_method(cls(), ONE)}[property]
    assert found.state == "FAIL"
    assert all(word in found.reason for word in words), found.reason


# --- new-method --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["encoder", "before_llm", "decoder", "cache"])
def test_a_new_method_passes_as_it_is(own_registry, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = f"my_{place}"
    assert main(["new-method", name, "--place", place]) == 0
    assert f"vlmprune check-method {name}.py" in capsys.readouterr().out
    code = main(["check-method", f"{name}.py", "--layouts", "llava_next,qwen2_5_vl"])
    out = capsys.readouterr().out
    assert code == 0, out
    assert f"{name}: " in out and " 0 FAIL" in out
    assert "pass  qwen2_5_vl          no host wait" in out
    text = (tmp_path / f"{name}.py").read_text()
    assert "from vlmprune.prune.contract import" in text and "from ." not in text
    assert place in ("encoder", "cache") or ", scores=" in text  # there for overlay(scores=True)
    assert f'@register("{name}")' in text and "--import" in text
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize(
    ("name", "file", "word"),
    [
        ("divprune", "mine.py", "is taken"),
        ("class", "mine.py", "cannot name a method"),
        ("my-method", "mine.py", "cannot name a method"),
        ("Mine", "mine.py", "cannot name a method"),
        ("mine", "there.py", "is there already"),
        ("mine", "mine.txt", "cannot be imported"),
        ("mine", "numpy.py", "in the way of the module 'numpy'"),
        ("random_rows", "random.py", "in the way of the module 'random'"),
        ("mine", "my-file.py", "cannot be imported"),
        ("mine", "no/where/mine.py", "cannot be written"),
    ],
)
def test_new_methods_that_cannot_be_written(tmp_path, name, file, word):
    (tmp_path / "there.py").write_text("x = 1\n")
    with pytest.raises(vlmprune.MethodFieldError, match=word):
        write_method(name, "decoder", tmp_path / file)
    assert (tmp_path / "there.py").read_text() == "x = 1\n"
    assert len(list(tmp_path.iterdir())) == 1


# --- methods of a file, on the command line ----------------------------------------------------


def test_a_sweep_of_a_method_in_a_file(own_registry, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_method("mine", "before_llm", tmp_path / "mine.py")
    words = ["sweep", "--import", "mine.py", "--methods", "mine", "--budgets", "0.25"]
    assert main([*words, "--limit", "2", "-o", "runs"]) == 0
    assert "mine" in capsys.readouterr().out
    assert yaml.safe_load((tmp_path / "runs/sweep.yaml").read_text())["imports"] == ["mine.py"]
    del registry._classes["mine"], sys.modules["mine"]
    assert main(["sweep", "--config", "runs/sweep.yaml", "-o", "runs"]) == 0
    assert "mine" in registry._classes


@pytest.mark.parametrize(
    ("source", "text", "words"),
    [
        ("mine.py", None, ("no file 'mine.py'",)),
        ("mine.py", "1 / 0", ("'mine.py' cannot be imported", "ZeroDivisionError")),
        ("mine.py", "x = 1", ("registers no method", "@register")),
        ("mine.py", "open('w.pt')", ("'mine.py' cannot be imported", "FileNotFound", "w.pt")),
        ("no_such_module", None, ("'no_such_module' cannot be imported", "give a file")),
    ],
)
def test_files_without_methods(own_registry, tmp_path, monkeypatch, capsys, source, text, words):
    monkeypatch.chdir(tmp_path)
    if text is not None:
        (tmp_path / source).write_text(text)
    assert main(["check-method", "mine", "--import", source]) == 2
    said = capsys.readouterr().err
    assert all(word.lower() in said.lower() for word in words), said


def test_a_file_that_is_named_like_a_module(own_registry, tmp_path, monkeypatch):
    import random as known

    from vlmprune.eval.importing import import_methods

    write_method("mine", "decoder", tmp_path / "mine.py").rename(tmp_path / "random.py")
    assert import_methods(str(tmp_path / "random.py")) == ["mine"]
    assert import_methods(str(tmp_path / "random.py")) == ["mine"]
    assert sys.modules["random"] is known


def test_a_field_of_another_type(own_registry, tmp_path, monkeypatch, capsys):
    write_method("mine", "before_llm", tmp_path / "mine.py")
    monkeypatch.chdir(tmp_path)
    words = ["--import", "mine.py", "--methods", "mine:order=abc", "--budgets", "0.25"]
    assert main(["sweep", *words]) == 2
    assert "mine with :order=abc is not possible: '<=' not supp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("methods", "budgets", "says"),
    [
        ("norm", [0.25], r"write methods=\['norm'\]"),
        (["norm"], 0.25, r"write budgets=\[0.25\]"),
        ([Norm()], [0.25], "write its name"),
    ],
)
def test_a_sweep_takes_lists_of_words(methods, budgets, says):
    with pytest.raises(vlmprune.MethodFieldError, match=says):
        sweep_model(None, None, methods, budgets)


def test_files_of_one_name_in_several_folders(own_registry, tmp_path):
    from vlmprune.eval.importing import import_methods

    for name in ("one", "two", "three"):
        (tmp_path / name).mkdir()
        write_method(name, "decoder", tmp_path / name / "same_name.py")
        assert import_methods(str(tmp_path / name / "same_name.py")) == [name]


def test_properties_are_explained():
    for holds in properties.PROPERTIES.values():
        assert isinstance(holds, Callable) and holds.__doc__.endswith(".")
