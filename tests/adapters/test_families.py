"""Which families there are: those whose models the installed `transformers` has."""

from __future__ import annotations

import pytest
import vlmprune
from vlmprune.adapters import registry
from vlmprune.adapters.registry import family_class, model_names
from vlmprune.eval.commands.models import models_table
from vlmprune.eval.models.registry import known_families


@pytest.fixture
def older(monkeypatch):
    """A release of transformers that does not have Qwen3-VL yet, and ViP-LLaVA in another form."""
    had = {k: v for k, v in registry.CONFIG_MAPPING_NAMES.items() if k != "qwen3_vl"}
    monkeypatch.setattr(registry.transformers, "__version__", "5.20.2")
    caches = (registry._files, known_families)
    for cached in caches:
        cached.cache_clear()
    monkeypatch.setattr(registry, "CONFIG_MAPPING_NAMES", had)
    yield
    for cached in caches:
        cached.cache_clear()


def test_what_the_package_requires_as_a_whole_is_not_asked_again(older, monkeypatch):
    """A serving engine with a transformers of its own may be older, where no model is patched."""
    monkeypatch.setattr(registry.transformers, "__version__", "5.19.0")
    assert "llava" in vlmprune.models() and "vipllava" not in vlmprune.models()


def test_families_that_a_release_lacks_are_absent(older):
    absent = {"qwen3_vl", "vipllava", "video_llava", "llava_next_video"}
    assert absent.isdisjoint({*vlmprune.models(), *known_families()})
    assert {"qwen2_vl", "llava_onevision"} <= {*vlmprune.models()}
    assert "qwen3_vl" not in {row[0] for row in models_table().rows}


@pytest.mark.parametrize("name", model_names())
def test_a_family_says_what_the_table_shows(name):
    family = family_class(name)
    major, minor = family.since.split(".")
    assert (int(major), int(minor)) >= (5, 20), "no older transformers is admitted"
    if family.check is not registry.Family.check:
        assert family.check.__doc__, "which variants are refused"
    (row,) = [row for row in models_table().rows if row[0] == name]
    assert all(row[:-1])
