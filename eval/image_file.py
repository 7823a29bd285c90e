"""Pictures from files: opened upright and in RGB, and checked before anything heavy runs."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from os import PathLike
from pathlib import Path
from typing import IO

from PIL import Image, ImageOps, UnidentifiedImageError

from ..prune.errors import VlmpruneError

ENOUGH = 2**24
"""Pixels that no model looks at more of."""


class InputError(VlmpruneError, ValueError):
    """A picture or question that cannot be read.

    Symptom: `ask`, `compare` or a sweep over own questions stops at a picture.
    Cause: the file is missing or no picture, `embedded:N` counts too far, or the question is
        missing behind it.
    Type: `vlmprune ask cat.jpg "What is it?"`, or `vlmprune ask embedded:24`.
    Page: ERRORS.md#inputerror
    """


def read_picture(image: Image.Image | str | PathLike[str]) -> Image.Image:
    """A picture or the file of one: in RGB, a photo turned as its camera was held.

    Of a JPEG with more than four times `ENOUGH` pixels only every second one, fourth or eighth is
    decoded, as many as leave enough.

    Raises:
        InputError: there is no such file, or it is no picture.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with _opened(Path(image)) as opened:
            share = min(1.0, (ENOUGH / (opened.width * opened.height)) ** 0.5)
            opened.draft("RGB", (ceil(opened.width * share), ceil(opened.height * share)))
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(_said(image, error)) from error


def check_picture(path: str | PathLike[str]) -> str:
    """The SHA-256 of a picture's file, which is decoded on the way (JPEG at an eighth of its size).

    Raises:
        InputError: there is no such file, or it is no picture, or a part of one.
    """
    try:
        content = Path(path).read_bytes()
        with _opened(io.BytesIO(content)) as opened:
            opened.draft("RGB", (opened.width // 8, opened.height // 8))
            opened.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(_said(path, error)) from error
    return hashlib.sha256(content).hexdigest()


@contextmanager
def _opened(file: Path | IO[bytes]) -> Iterator[Image.Image]:
    """A picture whose size is known, without Pillow's warning that it is large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(file) as opened:
            yield opened


def _said(image: object, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"{str(image)!r} is not a picture that Pillow can read."
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        return (
            f"{str(image)!r} has more than the {limit:.3g} megapixels that Pillow opens: scale it "
            f"down first."
        )
    return f"{str(image)!r} cannot be read: {getattr(error, 'strerror', None) or error}."
