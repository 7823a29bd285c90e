"""What the evaluation knows of model families, found by name."""

import logging
import sys
from types import SimpleNamespace

import pytest
import vlmprune
from kit.installed import install
from vlmprune.adapters import registry as adapters
from vlmprune.eval.commands.models import models_table
from vlmprune.eval.lmms.stock import wrapper_of
from vlmprune.eval.models import registry
from vlmprune.eval.models.loading import limit_pixels, scales_pictures
from vlmprune.eval.models.registry import all_families, known_families, known_family
from vlmprune.eval.models.shapes import SHAPES, prompt, usual_picture


def a_model(model_type: str):
    return SimpleNamespace(config=SimpleNamespace(model_type=model_type))


def test_every_family_is_known_in_the_order_of_versions():
    assert sorted(known_families()) == vlmprune.models()
    of_qwen = [name for name in known_families() if name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")]
    assert of_qwen == ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


@pytest.mark.parametrize("name", known_families())
def test_shapes_are_of_their_family(name):
    family = known_family(name)
    for shape in family.shapes + family.small_shapes:
        assert shape.config().model_type == name
        assert SHAPES[shape.name] is shape


def test_a_family_without_a_file_is_told_where_to_write_one():
    model = a_model("theirs")
    assert known_family("theirs") is None
    for ask in (
        lambda: usual_picture(model.config),
        lambda: prompt(model.config, (8, 8), batch_size=1, device="meta"),
    ):
        with pytest.raises(vlmprune.UnsupportedModelError) as refused:
            ask()
        message = str(refused.value)
        assert "'theirs'" in message and "eval/models/families/theirs.py" in message
        assert registry.ENTRY_POINT_GROUP in message


def test_a_family_without_a_file_takes_pictures_as_they_are():
    model = a_model("theirs")
    assert wrapper_of(model) == "vlmprune" and not scales_pictures(model)
    with pytest.raises(vlmprune.MethodFieldError, match="only the Qwen families scale pictures"):
        limit_pixels(model, None, {"max_pixels": 3})


GROUPS = {
    adapters.ENTRY_POINT_GROUP: {"aya": "plugin_one:Theirs"},
    registry.ENTRY_POINT_GROUP: {"aya": "plugin_one:TheirEval"},
}
THEIRS = """
from vlmprune.adapters.families import llava
from vlmprune.eval.models.families import llava as eval_llava

class Theirs(llava.Llava):
    name = "aya"

class TheirEval(eval_llava.Llava):
    line = "Aya"
"""


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder of installed packages, which this process sees."""
    monkeypatch.syspath_prepend(tmp_path)
    cached = (registry._plugins, known_families, known_family, all_families)
    cached += (adapters._plugins, adapters.family_class)
    for found in cached:
        found.cache_clear()
    yield tmp_path
    for found in cached:
        found.cache_clear()
    sys.modules.pop("plugin_one", None)


def test_another_package_says_what_is_known_of_its_family(site):
    before = known_families()
    for found in (registry._plugins, known_families, adapters._plugins):
        found.cache_clear()
    install(site, "plugin_one", GROUPS, THEIRS)
    assert known_families() == (*before, "aya"), "behind ours"
    assert "plugin_one" not in sys.modules, "listing imports nothing"
    family = known_family("aya")
    assert family.line == "Aya" and family in all_families()
    config = SHAPES["llava-1.5-7b"].config()
    config.model_type = "aya"
    assert usual_picture(config) == (336, 336)
    assert wrapper_of(a_model("aya")) == family.wrapper != "vlmprune"


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("raise RuntimeError('no licence')", "no licence"),
        ("TheirEval = dict", "is no EvalFamily: derive a class from"),
        (
            "from vlmprune.eval.models.family import EvalFamily\n"
            "class TheirEval(EvalFamily):\n    line = 'Aya'",
            "does not define pixels, usual_picture",
        ),
    ],
)
def test_what_is_broken_raises_where_it_is_asked_for(site, caplog, source, word):
    points = {"aya": "plugin_two:TheirEval"}
    install(site, "plugin_one", GROUPS | {registry.ENTRY_POINT_GROUP: points}, THEIRS)
    (site / "plugin_two.py").write_text(source)
    try:
        with pytest.raises(vlmprune.PluginError, match=word):
            known_family("aya")
        with caplog.at_level(logging.WARNING, "vlmprune"):
            assert len(all_families()) == len(known_families()) - 1
        assert word in caplog.text and "pip uninstall plugin_one" in caplog.text
        (row,) = [row for row in models_table().rows if row[0] == "aya"]
        assert word in row[1]
    finally:
        sys.modules.pop("plugin_two", None)


def test_what_is_known_of_a_shipped_family_stays_ours_and_is_said(site, caplog):
    points = {"llava": "plugin_one:TheirEval"}
    install(site, "plugin_one", {registry.ENTRY_POINT_GROUP: points}, THEIRS)
    with caplog.at_level(logging.WARNING, "vlmprune"):
        assert known_family("llava").line == "LLaVA"
    assert "The EvalFamily 'llava' of the package plugin_one" in caplog.text
    assert "plugin_one" not in sys.modules
