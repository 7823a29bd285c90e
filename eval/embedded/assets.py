"""Loads the sprite sheets and background photos of one split."""

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from .vocabulary import EMOJI, FIRST_DIGIT, FIRST_GARMENT

DATA_DIR = Path(__file__).parent / "data"
EMOJI_SIDE, GARMENT_SIDE, DIGIT_SIDE = 64, 28, 8
SCALES = (1.0, 0.6, 0.4)  # a background is cropped from the photo at one of these sizes


def _sheet(file: Path, side: int) -> np.ndarray:
    """A sprite sheet as [rows, columns, side, side(, channels)]."""
    with Image.open(file) as image:
        pixels = np.asarray(image)
    rows, columns = pixels.shape[0] // side, pixels.shape[1] // side
    return pixels.reshape(rows, side, columns, side, *pixels.shape[2:]).swapaxes(1, 2)


@lru_cache
def emoji() -> np.ndarray:
    """[classes, 64, 64, RGBA], uint8."""
    return _sheet(DATA_DIR / "emoji.png", EMOJI_SIDE)[0]


@lru_cache
def garments(split: str) -> np.ndarray:
    """[classes, samples, 28, 28], uint8."""
    return _sheet(DATA_DIR / split / "garments.png", GARMENT_SIDE)


@lru_cache
def digits(split: str) -> np.ndarray:
    """[10, samples, 8, 8], uint8."""
    return _sheet(DATA_DIR / split / "digits.png", DIGIT_SIDE)


@lru_cache
def photos(split: str) -> dict[str, list[np.ndarray]]:
    """Background photos by name, each at the sizes of `SCALES`."""
    found = {}
    for file in sorted((DATA_DIR / split).glob("*.jpg")):
        with Image.open(file) as image:
            sizes = [(round(image.width * s), round(image.height * s)) for s in SCALES]
            found[file.stem] = [
                np.asarray(image.resize(size, Image.Resampling.LANCZOS)) for size in sizes
            ]
    return found


def variants(split: str, cls: int) -> int:
    """How many different pictures there are of an object class."""
    if cls < FIRST_GARMENT:
        return 1
    return (garments(split) if cls < FIRST_DIGIT else digits(split)).shape[1]


@lru_cache(maxsize=100_000)
def sprite(split: str, cls: int, variant: int, size: int) -> np.ndarray:
    """One object's picture, size x size: RGBA for emoji, intensity otherwise."""
    if cls < len(EMOJI):
        pixels, resampling = emoji()[cls], Image.Resampling.LANCZOS
    elif cls < FIRST_DIGIT:
        pixels = garments(split)[cls - FIRST_GARMENT, variant]
        resampling = Image.Resampling.LANCZOS
    else:
        pixels, resampling = digits(split)[cls - FIRST_DIGIT, variant], Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize((size, size), resampling))
