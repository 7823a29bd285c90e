"""Pictures from files: opened upright and in RGB, and checked before anything heavy runs."""

from __future__ import annotations

import hashlib
import io
from os import PathLike
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from ..prune.errors import VlmpruneError


class InputError(VlmpruneError, ValueError):
    """A picture or question that cannot be read."""


def read_picture(image: Image.Image | str | PathLike[str]) -> Image.Image:
    """A picture or the file of one: in RGB, a photo turned as its camera was held.

    Raises:
        InputError: there is no such file, or it is no picture.
    """
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    try:
        with Image.open(Path(image)) as opened:
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
        with Image.open(io.BytesIO(content)) as opened:
            opened.draft("RGB", (opened.width // 8, opened.height // 8))
            opened.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(_said(path, error)) from error
    return hashlib.sha256(content).hexdigest()


def _said(image: object, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"{str(image)!r} is not a picture that Pillow can read."
    return f"{str(image)!r} cannot be read: {getattr(error, 'strerror', None) or error}."
