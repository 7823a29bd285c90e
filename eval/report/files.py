"""The files that a result file names: read from below its folder and nowhere else."""

from __future__ import annotations

from pathlib import Path


class NoFileError(Exception):
    """Why a picture is not shown, or what else a result file names; said in its place."""


def file_below(folder: Path, name: str) -> Path:
    """The file called `name` below `folder`.

    A result file may come from anybody: what it names must not reach out of its folder, be it by
    dots, a root or a link.

    Raises:
        NoFileError: it would, or there is no such file.
    """
    try:
        root = folder.resolve()
        file = (root / name).resolve()
        if not file.is_relative_to(root):
            raise NoFileError("not shown: it is outside the folder of the results")
        if not file.is_file():
            raise NoFileError("the file is missing")
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, a loop of links
        raise NoFileError("not shown: no name of a file") from error
    return file
