"""Model families of other installed packages: listed, and loaded where they are needed."""

from __future__ import annotations

import logging
import sys

import pytest
import torch
import vlmprune
from kit import zoo
from kit.installed import install
from vlmprune.adapters import registry
from vlmprune.adapters.registry import ENTRY_POINT_GROUP as GROUP
from vlmprune.adapters.registry import family_class, family_of, model_names
from vlmprune.eval.commands.models import models_table
from vlmprune.prune.errors import PluginError, UnsupportedModelError

WORKING = '''"""A LLaVA under another name."""
from vlmprune.adapters.families.llava import Llava

class Theirs(Llava):
    name = "theirs"
'''


def forget() -> None:
    registry._plugins.cache_clear()
    family_class.cache_clear()


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder of installed packages, which this process sees."""
    monkeypatch.syspath_prepend(tmp_path)
    forget()
    yield tmp_path
    forget()
    for name in [name for name in sys.modules if name.startswith("plugin_")]:
        del sys.modules[name]


def theirs():
    """A model of the family that the packages bring."""
    model = zoo.CASES["llava-clip-llama"].model()
    model.config.model_type = "theirs"
    return model


def test_a_model_of_another_packages_family_is_pruned(site):
    install(site, "plugin_one", {GROUP: {"theirs": "plugin_one:Theirs"}}, WORKING)
    assert "theirs" in vlmprune.models()
    assert "plugin_one" not in sys.modules, "listing imports nothing"
    model, inputs = theirs(), zoo.CASES["llava-clip-llama"].inputs()
    with vlmprune.patch(model, "divprune", keep_ratio=0.5) as handle, torch.no_grad():
        found = model(**inputs).logits
        (_, entering, *_), *_ = handle.last.tokens_per_layer
    with (
        vlmprune.patch(zoo.CASES["llava-clip-llama"].model(), "divprune", keep_ratio=0.5) as same,
        torch.no_grad(),
    ):
        assert torch.equal(same._engine.model(**inputs).logits, found)
    assert entering == 18
    (row,) = [row for row in models_table().rows if row[0] == "theirs"]
    assert row[1] == "A LLaVA under another name." and "original, repacked" in row


BROKEN = {
    "missing": ("plugin_gone:Theirs", None, "ModuleNotFoundError", "plugin_gone"),
    "raising": ("plugin_one:Theirs", "raise RuntimeError('no licence')", "no licence"),
    "leaving": ("plugin_one:Theirs", "raise SystemExit(3)", "SystemExit: 3"),
    "without": ("plugin_one:Theirs", "x = 1", "AttributeError"),
    "no family": ("plugin_one:Theirs", "Theirs = dict", "TypeError", "is no Family"),
    "half": (
        "plugin_one:Theirs",
        "from vlmprune.adapters.family import Family\nclass Theirs(Family):\n    name = 'theirs'",
        "does not define encoder_features",
    ),
    "another name": (
        "plugin_one:Theirs",
        WORKING.replace('"theirs"', '"ours"'),
        "Theirs.name is not 'theirs'",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_family_is_listed_and_raises_only_where_it_is_needed(site, how):
    value, source, *words = BROKEN[how]
    install(site, "plugin_one", {GROUP: {"theirs": value}}, source)
    assert "theirs" in vlmprune.models()
    (row,) = [row for row in models_table().rows if row[0] == "theirs"]
    assert all(word in row[1] for word in (*words, "plugin_one", value)), row[1]
    with pytest.raises(PluginError, match="pip uninstall plugin_one"):
        vlmprune.patch(theirs(), "divprune", keep_ratio=0.5)
    vlmprune.patch(zoo.CASES["qwen3_vl"].model(), "divprune", keep_ratio=0.5).remove()
    other = zoo.CASES["llava-clip-llama"].model()
    other.config.model_type = "nobodys"
    with pytest.raises(UnsupportedModelError, match="theirs"):
        family_of(other)


def test_a_shipped_family_stays_ours_and_is_said(site, caplog):
    install(site, "plugin_one", {GROUP: {"llava": "plugin_one:Theirs"}}, WORKING)
    with caplog.at_level(logging.WARNING, "vlmprune"):
        assert family_class("llava").__module__.startswith("vlmprune.")
        model_names()
    (said,) = [record.getMessage() for record in caplog.records]
    assert "The model family 'llava' of the package plugin_one (plugin_one:Theirs)" in said
    assert "vlmprune has a model family of this name" in said
    assert models_table().notes == said
    assert "plugin_one" not in sys.modules
