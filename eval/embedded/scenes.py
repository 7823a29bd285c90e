"""Scenes: objects placed freely on a photo, described by plain numbers and rendered from them.

`compose` draws a random `Scene`; `render` turns it into pixels without any randomness, so a stored
scene is always the same picture.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from . import assets
from .vocabulary import CATEGORIES, COLORS, FIRST_DIGIT, FIRST_GARMENT, NOUNS

SIDE, PATCH = 112, 8
GRID = SIDE // PATCH
PATCHES = GRID * GRID
COVERED = 0.15  # a patch belongs to an object that covers this share of it

_PALETTE = np.array(list(COLORS.values()))
_CLASSES = {name: [NOUNS.index(noun) for noun in nouns] for name, nouns in CATEGORIES.items()}
_THEMES = ("animals", "foods", "vehicles", "clothes")


@dataclass(frozen=True)
class Thing:
    """One object: its class, which picture of it, its box and its paint."""

    cls: int
    variant: int
    y: int
    x: int
    size: int
    flip: bool
    color: int  # index into COLORS, -1 for emoji
    tint: tuple[int, int, int]  # percent of the emoji's own colours, or the colour to paint in

    @property
    def name(self) -> str:
        """The class's word."""
        return NOUNS[self.cls]

    @property
    def center(self) -> tuple[float, float]:
        """(y, x) in pixels."""
        return self.y + self.size / 2, self.x + self.size / 2


@dataclass(frozen=True)
class Backdrop:
    """A crop of a photo with its contrast and brightness in percent."""

    photo: str
    scale: int
    y: int
    x: int
    flip: bool
    channels: tuple[int, int, int]
    contrast: int
    gain: int


@dataclass(frozen=True)
class Scene:
    """A background and the objects on it."""

    split: str
    backdrop: Backdrop
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Rendered:
    """Pixels [112, 112, 3] and, per object, the share of each patch it covers [things, 196]."""

    pixels: np.ndarray
    coverage: np.ndarray

    @property
    def owned(self) -> np.ndarray:
        """Which patches belong to each object, bool [things, 196]."""
        return self.coverage >= COVERED


def _backdrop(rng: np.random.Generator, split: str) -> Backdrop:
    photos = assets.photos(split)
    name = sorted(photos)[rng.integers(len(photos))]
    fits = [i for i, photo in enumerate(photos[name]) if min(photo.shape[:2]) >= SIDE]
    scale = fits[rng.integers(len(fits))]
    height, width = photos[name][scale].shape[:2]
    channels = rng.permutation(3) if split == "train" and rng.random() < 0.3 else range(3)
    return Backdrop(
        photo=name,
        scale=scale,
        y=int(rng.integers(height - SIDE + 1)),
        x=int(rng.integers(width - SIDE + 1)),
        flip=bool(rng.random() < 0.5),
        channels=(int(channels[0]), int(channels[1]), int(channels[2])),
        contrast=int(rng.integers(40, 81)),
        gain=int(rng.integers(55, 93)),
    )


def _size(rng: np.random.Generator, cls: int) -> int:
    if cls >= FIRST_DIGIT:
        return int(rng.integers(14, 21))
    if cls >= FIRST_GARMENT:
        return int(rng.integers(14, 25))
    return int(rng.integers(10, 14) if rng.random() < 0.25 else rng.integers(14, 25))


def _any_class(rng: np.random.Generator) -> int:
    draw = rng.random()
    if draw < 0.45:
        return int(rng.integers(FIRST_GARMENT))
    if draw < 0.72:
        return int(rng.integers(FIRST_GARMENT, FIRST_DIGIT))
    return int(rng.integers(FIRST_DIGIT, len(NOUNS)))


def _classes(rng: np.random.Generator) -> list[int]:
    """Classes of a scene: often some digits to read, or several of one category to count."""
    draw, total = rng.random(), int(rng.integers(4, 8))
    chosen: list[int] = []
    if draw < 0.4:
        picked = rng.permutation(10)[: int(rng.integers(2, 4))]
        chosen = [FIRST_DIGIT + int(digit) for digit in picked]
    elif draw < 0.8:
        pool = _CLASSES[_THEMES[rng.integers(len(_THEMES))]]
        chosen = [pool[rng.integers(len(pool))] for _ in range(int(rng.integers(2, 5)))]
    while len(chosen) < total:
        cls = _any_class(rng)
        if not (draw < 0.4 and cls >= FIRST_DIGIT):
            chosen.append(cls)
    return chosen


def _place(
    rng: np.random.Generator, boxes: list[tuple[int, int, int]], size: int, gap: int
) -> tuple[int, int] | None:
    """A free place for a box, by rejection; None where there is none to be found."""
    for y, x in rng.integers(SIDE - size + 1, size=(40, 2)).tolist():
        if all(
            y >= v + s + gap or v >= y + size + gap or x >= u + s + gap or u >= x + size + gap
            for v, u, s in boxes
        ):
            return y, x
    return None


def compose(rng: np.random.Generator, split: str = "train", dense: bool = False) -> Scene:
    """A random scene of 4-7 objects, or of up to 16 with `dense`."""
    backdrop = _backdrop(rng, split)
    if dense:
        classes = [_any_class(rng) for _ in range(int(rng.integers(12, 17)))]
    else:
        classes = _classes(rng)
    sized = sorted(((_size(rng, cls), cls) for cls in classes), reverse=True)
    boxes: list[tuple[int, int, int]] = []
    things = []
    for size, cls in sized:
        place = _place(rng, boxes, size, gap=1 if dense else 2)
        if place is None:
            continue
        boxes.append((*place, size))
        things.append(_thing(rng, split, cls, place, size))
    return Scene(split, backdrop, tuple(things))


def alone(rng: np.random.Generator, cls: int, split: str = "train") -> Scene:
    """A random scene of one object of a class."""
    backdrop, size = _backdrop(rng, split), _size(rng, cls)
    y, x = rng.integers(SIDE - size + 1, size=2).tolist()
    return Scene(split, backdrop, (_thing(rng, split, cls, (y, x), size),))


def _thing(
    rng: np.random.Generator, split: str, cls: int, place: tuple[int, int], size: int
) -> Thing:
    if cls < FIRST_GARMENT:
        strength = int(rng.integers(85, 111))
        color, tint = -1, (strength, strength, strength)
    else:
        color = int(rng.integers(len(_PALETTE)))
        red, green, blue = (_PALETTE[color] + rng.integers(-16, 17, size=3)).tolist()
        tint = (red, green, blue)
    return Thing(
        cls=cls,
        variant=int(rng.integers(assets.variants(split, cls))),
        y=place[0],
        x=place[1],
        size=size,
        flip=bool(cls < FIRST_DIGIT and rng.random() < 0.5),
        color=color,
        tint=tint,
    )


@lru_cache(maxsize=64)
def _digit_tag(size: int) -> np.ndarray:
    alpha = np.ones((size, size, 1), np.float32)
    alpha[[0, 0, -1, -1], [0, -1, 0, -1]] = 0
    return alpha


def _paint(split: str, thing: Thing) -> tuple[np.ndarray, np.ndarray]:
    """Colour [size, size, 3] and opacity [size, size, 1] of one object."""
    tint = np.array(thing.tint, np.float32)
    if thing.cls < FIRST_GARMENT:
        pixels = assets.sprite(split, thing.cls, 0, thing.size).astype(np.float32)
        color, alpha = pixels[..., :3] * (tint / 100), pixels[..., 3:] / 255
    elif thing.cls < FIRST_DIGIT:
        pixels = assets.sprite(split, thing.cls, thing.variant, thing.size)
        light = pixels.astype(np.float32)[..., None] / 255
        color, alpha = tint * (0.3 + 0.7 * light), np.clip(light * 4, 0, 1)
    else:  # ink on a dark tag
        ink = np.zeros((thing.size, thing.size, 1), np.float32)
        pixels = assets.sprite(split, thing.cls, thing.variant, thing.size - 3)
        ink[1:-2, 1:-2, 0] = pixels.astype(np.float32) / 255
        color, alpha = 28 + (tint - 28) * np.clip(ink * 1.3, 0, 1), _digit_tag(thing.size)
    if thing.flip:
        color, alpha = color[:, ::-1], alpha[:, ::-1]
    return color, alpha


def render(scene: Scene) -> Rendered:
    """The picture of a scene and the patches of its objects."""
    drop = scene.backdrop
    photo = assets.photos(scene.split)[drop.photo][drop.scale]
    canvas = photo[drop.y : drop.y + SIDE, drop.x : drop.x + SIDE].astype(np.float32)
    if drop.flip:
        canvas = canvas[:, ::-1]
    canvas = canvas[..., list(drop.channels)]
    mean = canvas.mean()
    canvas = (mean + (canvas - mean) * (drop.contrast / 100)) * (drop.gain / 100)
    coverage = np.zeros((len(scene.things), PATCHES), np.float32)
    for index, thing in enumerate(scene.things):
        color, alpha = _paint(scene.split, thing)
        box = (slice(thing.y, thing.y + thing.size), slice(thing.x, thing.x + thing.size))
        canvas[box] = canvas[box] * (1 - alpha) + color * alpha
        opaque = np.zeros((SIDE, SIDE), np.float32)
        opaque[box] = alpha[..., 0] > 0.4
        coverage[index] = opaque.reshape(GRID, PATCH, GRID, PATCH).mean((1, 3)).reshape(-1)
    return Rendered(np.clip(canvas, 0, 255).round().astype(np.uint8), coverage)
