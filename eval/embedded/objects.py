"""Pictures of one object each, for classifiers: held out, as plain numbers, rendered when asked.

`data/objects.jsonl` holds a scene a line, the classes taking turns; the pictures are rendered from
it and from the test split's assets. Written by `python -m vlmprune.eval.embedded.objects`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from . import assets
from .benchmark import scene_of
from .scenes import Scene, alone, render
from .vocabulary import NOUNS

FILE = assets.DATA_DIR / "objects.jsonl"
TASK, TASK_VERSION = "tinyobjects", "1"
SEED, PER_CLASS = 2027, 20


@dataclass(frozen=True)
class Shown:
    """A picture of an object of the class `label`."""

    id: str
    label: str
    scene: Scene

    def render(self) -> Image.Image:
        """112 x 112 RGB."""
        return Image.fromarray(render(self.scene).pixels)


def scenes(seed: int, split: str, per_class: int) -> Iterator[Scene]:
    """Random scenes of one object, the classes taking turns."""
    rng = np.random.default_rng(seed)
    for _ in range(per_class):
        for cls in range(len(NOUNS)):
            yield alone(rng, cls, split)


def encode() -> bytes:
    """The file's bytes."""
    lines = []
    for scene in scenes(SEED, "test", PER_CLASS):
        things = [asdict(thing) for thing in scene.things]
        line = {"split": scene.split, "backdrop": asdict(scene.backdrop), "things": things}
        lines.append(json.dumps(line, separators=(",", ":")) + "\n")
    return "".join(lines).encode()


@lru_cache
def shown() -> tuple[Shown, ...]:
    """All stored pictures: the classes take turns, so that every prefix is balanced."""
    found = [scene_of(json.loads(line)) for line in FILE.read_text().splitlines()]
    return tuple(
        Shown(f"{number:04d}", scene.things[0].name, scene) for number, scene in enumerate(found)
    )


def digest(file: Path = FILE) -> str:
    """SHA-256 of the file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    FILE.write_bytes(encode())
    sys.stdout.write(digest() + "\n")
