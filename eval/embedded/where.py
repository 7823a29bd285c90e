"""Where something is: questions whose answer is a cell of a 3 x 3 grid, a task of their own.

    where is the cat ?  ->  top left

`data/where.jsonl` holds held-out scenes with their questions as `data/questions.jsonl` does, every
cell the answer to equally many; written by `python -m vlmprune.eval.embedded.where`. The word
`where` is known to the model `embedded-where` alone.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from . import Question, assets, fields_of
from .asking import candidates
from .benchmark import digest, encode, records, rendered, scene_record
from .scenes import compose
from .vocabulary import PLACES, WHERE

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = assets.DATA_DIR / "where.jsonl"
SEED, PER_PLACE, PER_SCENE = 2028, 40, 2
CELLS = {place.replace(" ", "-"): place for place in PLACES}
"""What each cell's questions are called as a kind, which is one word: its answer."""


class WhereQuestion(Question):
    """A question of this task. Its `kind` is the cell, so that scores are told cell by cell."""

    @property
    def image(self) -> Image:
        """The picture, 112 x 112 RGB."""
        from PIL import Image

        return Image.fromarray(rendered(self.image_id, FILE).pixels)


def generate() -> list[dict[str, Any]]:
    """All scenes with their questions: `PER_PLACE` of each cell, at most `PER_SCENE` a scene."""
    rng = np.random.default_rng(SEED)
    left = dict.fromkeys(PLACES, PER_PLACE)
    found: list[dict[str, Any]] = []
    total = 0
    while any(left.values()):
        scene = compose(rng, "test")
        pool = candidates(rng, scene)[WHERE]
        by_place = {" ".join(asked.answer): asked for asked in pool}
        lagging = sorted((place for place in by_place if left[place]), key=lambda p: -left[p])
        chosen = [by_place[place] for place in lagging[:PER_SCENE]]
        if not chosen:
            continue
        for asked in chosen:
            left[" ".join(asked.answer)] -= 1
        found.append(scene_record(len(found), scene, chosen, total))
        total += len(chosen)
    return found


@lru_cache
def _all() -> tuple[WhereQuestion, ...]:
    by_kind: dict[str, list[WhereQuestion]] = {kind: [] for kind in CELLS}
    for record in records(FILE):
        for entry in record["questions"]:
            told = fields_of(record, entry) | {"kind": entry["answer"].replace(" ", "-")}
            by_kind[told["kind"]].append(WhereQuestion(**told))
    return tuple(one for turn in zip(*by_kind.values(), strict=True) for one in turn)


def where_questions(limit: int | None = None) -> list[WhereQuestion]:
    """The task's questions: the cells take turns, so that every prefix is balanced."""
    return list(_all()[:limit])


if __name__ == "__main__":
    FILE.write_bytes(encode(generate()))
    counts = Counter(question.kind for question in where_questions())
    sys.stdout.write(f"{digest(FILE)} {json.dumps(counts)}\n")
