"""Training batches, each a function of (seed, step) alone: no state to save, no order to keep."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..asking import PACK, Asked, ask
from ..scenes import COVERED, GRID, PATCH, PATCHES, SIDE, Rendered, Scene, compose, render
from ..vocabulary import BOS, EOS, IMAGE, KINDS, NOUNS, WHERE, WORD_ID, encode

BACKGROUND = len(NOUNS)
IGNORED = -100
ASKABLE = (*KINDS, WHERE)
DOMINANT = 0.2  # a patch is labelled with the class of an object that covers this share of it
LOCATION_WAVES = (0.5, 1.0, 2.0, 4.0)  # periods per image side
LOCATIONS = 4 * len(LOCATION_WAVES)
PREFIX = [WORD_ID[BOS], *encode("user :"), *[WORD_ID[IMAGE]] * PATCHES]
IMAGE_AT = PREFIX.index(WORD_ID[IMAGE])
FULL_SHARE = 0.3  # of the batches keep every visual token
KEPT = (0.1, 0.9)  # the others keep a share drawn from here


def location_code(centers: np.ndarray) -> np.ndarray:
    """(y, x) in pixels, [N, 2] -> sines and cosines [N, LOCATIONS]."""
    phase = 2 * np.pi * centers[:, :, None] / SIDE * np.array(LOCATION_WAVES)
    return np.concatenate([np.sin(phase), np.cos(phase)], axis=2).reshape(len(centers), -1)


@dataclass
class PatchLabels:
    """What the vision stage has to say of each patch."""

    cls: np.ndarray  # [196] class, BACKGROUND, or IGNORED where it is ambiguous
    color: np.ndarray  # [196] colour of a coloured object, IGNORED elsewhere
    location: np.ndarray  # [196, LOCATIONS] of the object's centre, or of a background patch's own
    anchor: np.ndarray  # [196] 1 where an object's centre lies
    present: np.ndarray  # [classes] which classes the scene shows


def patch_labels(scene: Scene, rendered: Rendered) -> PatchLabels:
    """Labels from the shares of each patch that the objects cover."""
    coverage, things = rendered.coverage, scene.things
    owner, share = coverage.argmax(0), coverage.max(0)
    classes = np.array([thing.cls for thing in things])
    colors = np.array([thing.color for thing in things])
    centers = np.array([thing.center for thing in things])
    cls = np.where(share >= DOMINANT, classes[owner], np.where(share > 0, IGNORED, BACKGROUND))
    painted = (share >= DOMINANT) & (colors[owner] >= 0)
    rows, columns = np.divmod(np.arange(PATCHES), GRID)
    own = np.stack([rows, columns], axis=1) * PATCH + PATCH / 2
    spots = np.where((share >= COVERED)[:, None], centers[owner], own)
    anchor = np.zeros(PATCHES, np.float32)
    anchor[(centers[:, 0] // PATCH * GRID + centers[:, 1] // PATCH).astype(int)] = 1
    present = np.zeros(len(NOUNS), np.float32)
    present[classes] = 1
    return PatchLabels(
        cls=cls.astype(np.int64),
        color=np.where(painted, colors[owner], IGNORED).astype(np.int64),
        location=location_code(spots).astype(np.float32),
        anchor=anchor,
        present=present,
    )


def _stack(labels: list[PatchLabels]) -> dict[str, Tensor]:
    return {
        field.name: torch.from_numpy(np.stack([getattr(label, field.name) for label in labels]))
        for field in fields(PatchLabels)
    }


class VisionBatches(Dataset[dict[str, Tensor]]):
    """Pictures with patch labels; most scenes are crowded, for more labels per picture."""

    def __init__(self, seed: int, size: int, steps: int, crowded: float = 0.7):
        self.seed, self.size, self.steps, self.crowded = seed, size, steps, crowded

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        rng = np.random.default_rng([self.seed, step])
        pictures, labels = [], []
        for _ in range(self.size):
            scene = compose(rng, dense=bool(rng.random() < self.crowded))
            rendered = render(scene)
            pictures.append(rendered.pixels)
            labels.append(patch_labels(scene, rendered))
        return {"pixels": torch.from_numpy(np.stack(pictures)), **_stack(labels)}


def loader(batches: Dataset[Any], start: int, workers: int) -> Iterator[Any]:
    """The batches from `start` on, made in another process where `workers` says so."""
    steps = range(start, len(batches))  # type: ignore[arg-type]
    return iter(
        DataLoader(
            batches,
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )
    )


@dataclass
class LanguageBatch:
    """Questions packed behind one shared image prefix per picture.

    The rows of `ids` are the questions of a picture one after the other; `block` numbers them (0 is
    padding), `place` counts from each question's first token, and `label` is what the token has to
    predict. `keep` are the visual tokens left after the random drop, the same number in every row.
    """

    pixels: Tensor  # [B, 112, 112, 3] uint8
    keep: Tensor  # [B, K] kept patches, ascending
    repacked: bool  # positions of what follows a dropped token close the gap
    first: Tensor  # [B, K] 1 for the first kept token of each object
    ids: Tensor  # [B, Q]
    label: Tensor  # [B, Q], IGNORED where nothing is to be said
    place: Tensor  # [B, Q]
    block: Tensor  # [B, Q]
    asked: Tensor  # [B, Q] number of the question in the batch
    kinds: Tensor  # [questions] index into ASKABLE
    looks: dict[str, tuple[Tensor, Tensor]]  # where to look: [n, 2] (row, token), [n, K] bool

    def to(self, device: str) -> "LanguageBatch":
        """The same batch on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()}
        moved["looks"] = {k: (a.to(device), b.to(device)) for k, (a, b) in self.looks.items()}
        return LanguageBatch(**moved)


def _any(kept: np.ndarray, things: tuple[int, ...]) -> np.ndarray:
    return np.asarray(kept[list(things)].any(0))


def _drop(rng: np.random.Generator, owned: list[np.ndarray]) -> tuple[np.ndarray, bool]:
    """Random visual tokens to keep [B, K]; sometimes all, sometimes mostly those of objects."""
    size = len(owned)
    if rng.random() < FULL_SHARE:
        return np.tile(np.arange(PATCHES), (size, 1)), False
    count = max(1, round(PATCHES * rng.uniform(*KEPT)))
    bias = rng.choice([0.0, 0.5, 1.0])
    score = rng.random((size, PATCHES))
    score += bias * np.stack([patches.any(0) for patches in owned])
    return np.sort(np.argsort(-score, axis=1)[:, :count], axis=1), bool(rng.random() < 0.5)


def _first_tokens(owned: np.ndarray, coverage: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """1 for the first kept patch of each object in reading order."""
    owner = np.where(owned.any(0), coverage.argmax(0), -1)[keep]
    first = np.zeros(len(keep), np.float32)
    for thing in range(len(owned)):
        at = np.flatnonzero(owner == thing)
        if len(at):
            first[at[0]] = 1
    return first


class LanguageBatches(Dataset["LanguageBatch"]):
    """Pictures, each with a pack of questions of these kinds."""

    def __init__(self, seed: int, size: int, steps: int, kinds: tuple[str, ...] = PACK):
        self.seed, self.size, self.steps, self.kinds = seed, size, steps, kinds

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> LanguageBatch:
        rng = np.random.default_rng([self.seed, step])
        scenes = [compose(rng) for _ in range(self.size)]
        questions = [ask(rng, scene, self.kinds) for scene in scenes]
        return pack(rng, [render(scene) for scene in scenes], questions)


def pack(
    rng: np.random.Generator, rendered: list[Rendered], questions: list[list[Asked]]
) -> LanguageBatch:
    """One batch of pictures and their questions, with a random drop of visual tokens."""
    owned = [picture.owned for picture in rendered]
    keep, repacked = _drop(rng, owned)
    fill = {"ids": 0, "label": IGNORED, "place": 0, "block": 0, "asked": 0}
    columns: dict[str, list[list[int]]] = {name: [] for name in fill}
    kinds: list[int] = []
    looks: dict[str, list[tuple[tuple[int, int], np.ndarray]]]
    looks = {"word": [], "early": [], "late": []}
    for row, (patches, pack_) in enumerate(zip(owned, questions, strict=True)):
        kept = patches[:, keep[row]]
        line: dict[str, list[int]] = {name: [] for name in columns}
        for block, asked in enumerate(pack_, start=1):
            words = encode(f"{asked.text} assistant :")
            answer = encode(" ".join(asked.answer))
            begin, length = len(line["ids"]), len(words) + len(answer)
            seen = all(kept[thing].any() for thing in asked.needs)
            labels = [*answer, WORD_ID[EOS]] if seen else [IGNORED] * (len(answer) + 1)
            line["ids"] += words + answer
            line["label"] += [IGNORED] * (len(words) - 1) + labels
            line["place"] += range(length)
            line["block"] += [block] * length
            line["asked"] += [len(kinds)] * length
            kinds.append(ASKABLE.index(asked.kind))
            if asked.kind == "count" or not asked.needs or not seen:
                continue  # where to look for a number of things is left to the model
            at = begin + len(words) - 1
            looks["word"].append(((row, at - 3), _any(kept, asked.steps[0][0])))
            for step, (reference, target) in enumerate(asked.steps):
                looks["early"].append(((row, at + step), _any(kept, reference)))
                looks["late"].append(((row, at + step), _any(kept, target)))
        for name, values in line.items():
            columns[name].append(values)
    width = max(len(ids) for ids in columns["ids"])
    tensors = {
        name: torch.tensor([values + [fill[name]] * (width - len(values)) for values in rows])
        for name, rows in columns.items()
    }
    first = [
        _first_tokens(picture.owned, picture.coverage, row)
        for picture, row in zip(rendered, keep, strict=True)
    ]
    return LanguageBatch(
        pixels=torch.from_numpy(np.stack([picture.pixels for picture in rendered])),
        keep=torch.from_numpy(keep),
        repacked=repacked,
        first=torch.from_numpy(np.stack(first)),
        kinds=torch.tensor(kinds),
        looks={
            name: (
                torch.tensor([where for where, _ in found]).reshape(-1, 2),
                torch.from_numpy(np.stack([mask for _, mask in found])),
            )
            for name, found in looks.items()
        },
        **tensors,
    )
