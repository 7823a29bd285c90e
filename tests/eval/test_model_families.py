"""What the evaluation knows of model families, found by name."""

from types import SimpleNamespace

import pytest
import vlmprune
from vlmprune.eval.lmms.stock import wrapper_of
from vlmprune.eval.models.loading import limit_pixels, scales_pictures
from vlmprune.eval.models.registry import known_families, known_family
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


def test_a_family_without_a_file_takes_pictures_as_they_are():
    model = a_model("theirs")
    assert wrapper_of(model) == "vlmprune" and not scales_pictures(model)
    with pytest.raises(vlmprune.MethodFieldError, match="only the Qwen families scale pictures"):
        limit_pixels(model, None, {"max_pixels": 3})
