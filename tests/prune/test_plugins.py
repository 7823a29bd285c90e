"""Methods of other installed packages: broken ones are listed, names that are taken said."""

from __future__ import annotations

import logging
import sys

import pytest
import vlmprune
from kit.installed import install
from vlmprune.eval import cli
from vlmprune.eval.commands.methods import methods_table
from vlmprune.prune import registry
from vlmprune.prune.errors import PluginError
from vlmprune.prune.plugins import ENTRY_POINT_GROUP as GROUP
from vlmprune.prune.registry import default_methods, method_class, method_names

WORKING = """
from dataclasses import dataclass
from vlmprune.prune.registry import method_class

@dataclass(frozen=True, kw_only=True)
class Theirs(method_class('fastv')):
    '''A FastV of another depth.'''
    layer: int = 3
"""


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder of installed packages, which this process sees, and a registry of its own."""
    default_methods()  # shipped ones register when they are imported, once
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.syspath_prepend(tmp_path)
    registry._plugins.cache_clear()
    yield tmp_path
    registry._plugins.cache_clear()
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


BROKEN = {
    "missing": ("plugin_gone:Theirs", None, "ModuleNotFoundError", "plugin_gone"),
    "raising": (
        "plugin_one:Theirs",
        "raise RuntimeError('no licence')",
        "RuntimeError: no licence",
    ),
    "leaving": ("plugin_one:Theirs", "raise SystemExit(3)", "SystemExit: 3"),
    "without": ("plugin_one:Theirs", "x = 1", "AttributeError"),
    "no method": ("plugin_one:Theirs", "Theirs = dict", "TypeError", "frozen dataclass"),
    "half": ("plugin_one:Theirs", WORKING + "Theirs = register\n", "NameError"),
    "after others": (
        "plugin_one:Theirs",
        WORKING + "from vlmprune.prune.registry import register\nregister('mine')(Theirs)\nx",
        "NameError",
    ),
    "a shipped class": (
        "plugin_one:Theirs",
        "from vlmprune.prune.registry import method_class\nTheirs = method_class('fastv')",
        "is 'fastv' already",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_listed_with_its_error_and_kills_nothing(site, how):
    value, source, *words = BROKEN[how]
    install(site, "plugin_one", {GROUP: {"theirs": value}}, source)
    assert "theirs" in method_names()
    (row,) = [row for row in methods_table().rows if row[0] == "theirs"]
    assert all(word in row[1] for word in (*words, "plugin_one", value)), row[1]
    assert len(methods_table().rows) == len(method_names())
    with pytest.raises(PluginError) as caught:
        vlmprune.method("theirs", keep_ratio=0.5)
    assert isinstance(caught.value, ImportError) and isinstance(
        caught.value, vlmprune.VlmpruneError
    )
    assert "pip uninstall plugin_one" in str(caught.value)
    assert not {"theirs", "mine"} & set(registry._classes)
    assert method_class("fastv").name == "fastv"
    with pytest.raises(vlmprune.UnknownMethodError):
        method_class("their")


def test_a_refusal_that_names_what_works_survives_a_broken_plugin(site):
    from kit import zoo

    install(site, "plugin_one", {GROUP: {"theirs": "plugin_gone:Theirs"}})
    with pytest.raises(vlmprune.MissingSignalError) as caught:
        vlmprune.patch(zoo.CASES["llava-siglip-qwen2"].model(), "vtc_cls", keep_ratio=0.5)
    assert "divprune" in str(caught.value) and "theirs" not in str(caught.value)


def test_a_class_with_fields_that_must_be_given_is_listed(site):
    source = WORKING.replace("layer: int = 3", "depth: int")
    install(site, "plugin_one", {GROUP: {"theirs": "plugin_one:Theirs"}}, source)
    made, wrong = default_methods()
    assert "theirs" not in made
    assert "depth" in wrong["theirs"]
    assert vlmprune.method("theirs", depth=1, keep_ratio=0.5).method.fields()["depth"] == 1


def test_a_shipped_name_stays_ours_and_is_said(site, caplog):
    install(site, "plugin_one", {GROUP: {"divprune": "plugin_one:Theirs"}}, WORKING)
    with caplog.at_level(logging.WARNING, "vlmprune"):
        assert method_class("divprune").__module__.startswith("vlmprune.")
        method_names()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "'divprune' of the package plugin_one (plugin_one:Theirs) is not used" in said
    assert "vlmprune has a method of this name" in said
    assert methods_table().notes == said
    assert "plugin_one" not in sys.modules


def test_two_packages_with_one_name(site, caplog):
    install(site, "plugin_two", {GROUP: {"theirs": "plugin_two:Theirs"}}, WORKING)
    install(site, "plugin_one", {GROUP: {"theirs": "plugin_one:Theirs"}}, WORKING)
    with caplog.at_level(logging.WARNING, "vlmprune"):
        assert method_class("theirs").__module__ == "plugin_one"
    (said,) = [record.getMessage() for record in caplog.records]
    assert "'theirs' of the package plugin_two" in said and "plugin_one has one" in said
    assert methods_table().notes == said


def test_one_package_that_is_found_twice_is_no_conflict(site, caplog, monkeypatch):
    install(site, "plugin_one", {GROUP: {"theirs": "plugin_one:Theirs"}}, WORKING)
    (again := site / "again").mkdir()
    install(again, "plugin_one2", {GROUP: {"theirs": "plugin_one:Theirs"}})
    monkeypatch.syspath_prepend(again)
    with caplog.at_level(logging.WARNING, "vlmprune"):
        assert method_class("theirs")().fields() == {"layer": 3}
    assert not caplog.records


def test_the_command_line_lists_them(site, monkeypatch, capsys):
    install(
        site,
        "plugin_one",
        {GROUP: {"theirs": "plugin_gone:T", "grid": "plugin_one:Theirs"}},
        WORKING,
    )
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["methods"]) == 0
    out, err = capsys.readouterr()
    assert "| theirs | The method 'theirs' comes from another package, plugin_one" in out
    assert "No module named 'plugin_gone'" in out
    assert "'grid' of the package plugin_one" in out
    assert "'grid' of the package plugin_one" in err
