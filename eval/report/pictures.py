"""The pictures of kept tokens, read from below a runs folder and nowhere else."""

from __future__ import annotations

import base64
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from .files import NoFileError, file_below

LARGEST = 8 * 2**20
_MIME = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


def data_uri(folder: Path, name: str) -> tuple[str, int, int]:
    """A picture as a `data:` URI, with its width and height.

    Raises:
        NoFileError: there is none, or it is not one that a page should hold.
    """
    file = file_below(folder, name)
    try:
        if file.stat().st_size > LARGEST:
            raise NoFileError(f"not shown: larger than {LARGEST // 2**20} MiB")
        with Image.open(file, formats=list(_MIME)) as picture:
            mime, (width, height) = _MIME[picture.format or ""], picture.size
        content = base64.b64encode(file.read_bytes()).decode()
    except UnidentifiedImageError as error:
        raise NoFileError("not shown: neither JPEG, PNG nor WebP") from error
    except (OSError, KeyError, Image.DecompressionBombError) as error:
        raise NoFileError("not shown: it cannot be read") from error
    return f"data:{mime};base64,{content}", width, height
