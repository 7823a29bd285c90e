"""Pictures in class folders, and which class of the model a folder is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .classifier import Classifier, ClassifierError


@dataclass(frozen=True)
class Pictures:
    """
    Attributes:
        files: with the folder's name of each.
        numbers: that name -> the model's class.
        named: whether classes were found by their names, and not by the order of the folders.
        digest: 12 hex digits over the names of folders and the bytes of files.
    """

    files: Sequence[tuple[Path, str]]
    numbers: Mapping[str, int]
    named: bool
    digest: str

    def batches(self, classifier: Classifier, size: int) -> Iterator[tuple[Tensor, list[int]]]:
        """(B, C, H, W) on the CPU, and the right classes."""
        from torchvision.datasets.folder import default_loader

        for start in range(0, len(self.files), size):
            part = self.files[start : start + size]
            rows = [classifier.transform(default_loader(str(file))) for file, _ in part]
            yield torch.stack(rows), [self.numbers[name] for _, name in part]


def read_pictures(folder: Path, classifier: Classifier, limit: int | None) -> Pictures:
    """All pictures, or `limit` of them at even distances in the order of classes.

    Folders are classes by their names where the model knows all of them (a part of its classes is
    enough then), else in alphabetical order, where there are as many as classes.

    Raises:
        ClassifierError: no class folders or pictures, or classes that are not the model's.
    """
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except OSError as error:
        raise ClassifierError(
            f"{folder} holds no pictures to classify ({str(error).splitlines()[0]}): give a folder "
            f"with a folder of pictures for each class, e.g. val/cat/1.jpg, val/dog/2.jpg."
        ) from error
    names = found.classes
    named = all(name in classifier.labels for name in names)
    if not named and len(names) != classifier.classes:
        raise ClassifierError(
            f"{folder} has {len(names)} class folders ({', '.join(names[:3])}, ...), the model "
            f"{classifier.classes} classes, and the folders are not called as its classes are: "
            f"give a folder for each class, or the model's own names."
        )
    every = [(Path(file), names[number]) for file, number in found.samples]
    count = len(every) if limit is None else min(limit, len(every))
    files = [every[number * len(every) // count] for number in range(count)]
    return Pictures(
        files=files,
        numbers={n: classifier.labels[n] if named else i for i, n in enumerate(names)},
        named=named,
        digest=_digest(files),
    )


def _digest(files: Sequence[tuple[Path, str]]) -> str:
    digest = hashlib.sha256()
    for file, name in files:
        digest.update(f"{name}\0".encode())
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]
