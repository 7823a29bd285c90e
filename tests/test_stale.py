"""Results are never stale: what decides a cell's outcome is part of its id."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from vlmprune.eval.fingerprint import content_hash, questions_hash

# --- What is asked ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Quiz:
    """A question of an own task, with a field that only the task knows."""

    id: int = 0
    kind: str = "color"
    question: str = "which color ?"
    answer: str = "red"
    image: Image.Image = field(default_factory=lambda: Image.new("RGB", (8, 8), "red"))
    answers: tuple[str, ...] = ("red", "crimson")


@pytest.mark.parametrize(
    "change",
    [
        {"id": 1},
        {"kind": "shape"},
        {"question": "what color ?"},
        {"answer": "blue"},
        {"answers": ("red",)},
        {"image": Image.new("RGB", (8, 8), "blue")},
        {"image": Image.new("RGB", (4, 16), "red")},
    ],
)
def test_whatever_a_question_says_or_shows_changes_the_hash(change):
    assert questions_hash([Quiz()]) == questions_hash([Quiz()])
    assert questions_hash([replace(Quiz(), **change)]) != questions_hash([Quiz()])
    assert questions_hash([Quiz(), Quiz()]) != questions_hash([Quiz()])


def test_a_hash_knows_values_apart_and_files_by_what_they_hold(tmp_path):
    values = [None, 0, False, "", "0", b"0", [], {}, ("a", "b"), ("ab",), (("a",), "b"), {"a": 1}]
    assert len({content_hash(value) for value in values}) == len(values)
    assert content_hash("a", "b") != content_hash("ab")
    assert content_hash({"a": 1, "b": 2}) == content_hash({"b": 2, "a": 1})
    for name, text in (("one", "same"), ("two", "same"), ("three", "other")):
        (tmp_path / name).write_text(text)
    one, two, three = (content_hash(Path(tmp_path / n)) for n in ("one", "two", "three"))
    assert one == two != three
    assert content_hash(np.arange(2)) == content_hash([0, 1]) and content_hash(np.int64(3))
    with pytest.raises(TypeError, match="no hash of object"):
        content_hash(object())
