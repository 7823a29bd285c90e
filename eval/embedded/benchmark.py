"""The benchmark file: held-out scenes and their questions, as plain numbers and words.

`data/questions.jsonl` holds one scene a line with its questions; the pictures are rendered from it
and from the test split's assets. Written by `python -m vlmprune.eval.embedded.benchmark`.
"""

import hashlib
import json
import sys
from collections import Counter
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from . import assets
from .asking import Asked, candidates, pick
from .scenes import Backdrop, Rendered, Scene, Thing, compose, render
from .vocabulary import KINDS

FILE = assets.DATA_DIR / "questions.jsonl"
SEED, PER_KIND, PER_SCENE = 2026, 180, 4


def scene_record(number: int, scene: Scene, asked: list[Asked], first: int) -> dict[str, Any]:
    """A scene and its questions, numbered from `first` on, as a line of the file."""
    owned = render(scene).owned
    questions = [
        {
            "id": f"{first + i:04d}",
            "kind": question.kind,
            "question": question.text,
            "answer": " ".join(question.answer),
            "things": list(question.needs),
            "patches": np.flatnonzero(owned[list(question.needs)].any(0)).tolist(),
        }
        for i, question in enumerate(asked)
    ]
    things = [asdict(thing) for thing in scene.things]
    return {
        "image": number,
        "split": scene.split,
        "backdrop": asdict(scene.backdrop),
        "things": things,
        "questions": questions,
    }


def generate() -> list[dict[str, Any]]:
    """All scenes with their questions: `PER_KIND` of each kind, at most `PER_SCENE` a scene."""
    rng = np.random.default_rng(SEED)
    asked_of: Counter[str] = Counter()
    records: list[dict[str, Any]] = []
    total = 0
    while total < PER_KIND * len(KINDS):
        scene = compose(rng, "test")
        pools = candidates(rng, scene)
        open_kinds = [kind for kind in KINDS if pools[kind] and asked_of[kind] < PER_KIND]
        open_kinds.sort(key=lambda kind: asked_of[kind])  # the kind that lags behind comes first
        chosen = [pick(rng, kind, pools[kind]) for kind in open_kinds[:PER_SCENE]]
        if not chosen:
            continue
        asked_of.update(question.kind for question in chosen)
        records.append(scene_record(len(records), scene, chosen, total))
        total += len(chosen)
    return records


def encode(records: list[dict[str, Any]]) -> bytes:
    """The file's bytes."""
    lines = (json.dumps(record, separators=(",", ":")) + "\n" for record in records)
    return "".join(lines).encode()


@lru_cache
def records(file: Path = FILE) -> list[dict[str, Any]]:
    """The scenes and questions of a file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def digest(file: Path = FILE) -> str:
    """SHA-256 of the benchmark file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def scene_of(record: dict[str, Any]) -> Scene:
    """The scene of a record."""
    drop = record["backdrop"]
    backdrop = Backdrop(**{**drop, "channels": tuple(drop["channels"])})
    things = (Thing(**{**thing, "tint": tuple(thing["tint"])}) for thing in record["things"])
    return Scene(record["split"], backdrop, tuple(things))


@lru_cache(maxsize=512)
def rendered(image: int, file: Path = FILE) -> Rendered:
    """The picture of a stored scene."""
    return render(scene_of(records(file)[image]))


if __name__ == "__main__":
    FILE.write_bytes(encode(generate()))
    sys.stdout.write(digest() + "\n")
