"""Pictures to be classified, and which class of the model each shows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..embedded import EMBEDDED, objects
from .classifier import Classifier, ClassifierError

IMAGENET = "imagenet"
"""What results call a folder of ImageNet's thousand classes (n01440764, ...), whatever its name."""


@dataclass(frozen=True)
class Picture:
    """A picture of the class `label`; `id` is its own among all."""

    id: str
    label: str
    open: Callable[[], Image.Image]


@dataclass(frozen=True)
class Pictures:
    """
    Attributes:
        name, version: what results call them; the version tells apart what they show.
        numbers: the label of each class -> the model's class.
    """

    name: str
    version: str
    shown: Sequence[Picture]
    numbers: Mapping[str, int]

    def batches(
        self, classifier: Classifier, size: int
    ) -> Iterator[tuple[Tensor, Sequence[Picture]]]:
        """(B, C, H, W) on the CPU, as the model takes them, and what they are of."""
        for start in range(0, len(self.shown), size):
            part = self.shown[start : start + size]
            yield torch.stack([classifier.transform(each.open()) for each in part]), part


def read_pictures(data: str, classifier: Classifier, limit: int | None) -> Pictures:
    """All pictures of a folder, or `limit` of them at even distances in the order of classes.

    Folders are classes by their names where the model knows all of them (a part of its classes is
    enough then), else in alphabetical order, where there are as many as classes.

    Args:
        data: the folder, or `embedded` for the pictures that ship with the package.

    Raises:
        ClassifierError: no class folders or pictures, or classes that are not the model's.
    """
    if data == EMBEDDED:
        every = [Picture(each.id, each.label, each.render) for each in objects.shown()]
        name, version = objects.TASK, objects.TASK_VERSION
    else:
        every = _in_folders(Path(data))
        name = version = ""
    labels = list(dict.fromkeys(each.label for each in every))
    numbers = _numbers(data, labels, classifier)
    count = len(every) if limit is None else min(limit, len(every))
    shown = [every[number * len(every) // count] for number in range(count)]
    if not name:
        whole = len(labels) == 1000 and all(re.fullmatch(r"n\d{8}", label) for label in labels)
        name = IMAGENET if whole else Path(data).resolve().name
        version = _digest(shown, numbers)
    return Pictures(name, version, shown, numbers)


def _in_folders(folder: Path) -> list[Picture]:
    from torchvision.datasets import ImageFolder
    from torchvision.datasets.folder import default_loader

    try:
        found = ImageFolder(str(folder))
    except OSError as error:
        raise ClassifierError(
            f"{folder} holds no pictures to classify ({str(error).splitlines()[0]}): give a folder "
            f"with a folder of pictures for each class, e.g. val/cat/1.jpg, val/dog/2.jpg."
        ) from error
    return [
        Picture(
            Path(file).relative_to(folder).as_posix(),
            found.classes[number],
            partial(default_loader, file),
        )
        for file, number in found.samples
    ]


def _numbers(data: str, labels: Sequence[str], classifier: Classifier) -> dict[str, int]:
    if all(label in classifier.labels for label in labels):
        return {label: classifier.labels[label] for label in labels}
    if len(labels) != classifier.classes:
        raise ClassifierError(
            f"{data} has {len(labels)} class folders ({', '.join(labels[:3])}, ...), the model "
            f"{classifier.classes} classes, and the folders are not called as its classes are: "
            f"give a folder for each class, or the model's own names."
        )
    return {label: number for number, label in enumerate(labels)}


def _digest(shown: Sequence[Picture], numbers: Mapping[str, int]) -> str:
    """12 hex digits over what the pictures show, and which class is meant by it."""
    digest = hashlib.sha256()
    for each in shown:
        digest.update(f"{each.label}\0{numbers[each.label]}\0".encode())
        digest.update(hashlib.sha256(each.open().tobytes()).digest())
    return digest.hexdigest()[:12]
