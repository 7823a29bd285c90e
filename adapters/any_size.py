"""Families whose encoder sees pictures of any size: patches of each in a row, padded to the
longest."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from ..prune.tiling import Block, Tiling
from .family import Call, Modality
from .merged import Merged

_Of = TypeVar("_Of")


class AnySize(Merged):
    """An image is one picture or several: tiles, or the frames of a video."""

    @abstractmethod
    def grids(self, call: Call) -> Sequence[tuple[int, int]]:
        """Rows and columns of tokens of each picture."""

    @abstractmethod
    def counts(self, call: Call) -> Sequence[int]:
        """Pictures of each image."""

    @abstractmethod
    def patches(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        """Values (pictures, patches, ...) of each picture without padding, row by row."""

    def whole(self, grids: Sequence[tuple[int, int]]) -> int | None:
        """Which picture of an image shows all of it, where the others are its tiles."""
        return None

    def per_picture(self, modality: Modality) -> frozenset[str]:
        """The arguments that have a row for each picture."""
        return frozenset({modality.pixels, self.sizes(modality)})

    def per_image_arguments(self, modality: Modality) -> frozenset[str]:
        return self.per_picture(modality)

    def of_images(self, call: Call, pictures: Sequence[_Of]) -> list[Sequence[_Of]]:
        """What there is of each picture, per image."""
        waiting = iter(pictures)
        return [[next(waiting) for _ in range(count)] for count in self.counts(call)]

    def joined(self, call: Call, pictures: Sequence[Tensor]) -> list[Tensor]:
        """Rows of pictures as those of images."""
        return [torch.cat(list(own)) for own in self.of_images(call, pictures)]

    def pictures(self, call: Call) -> Sequence[Sequence[tuple[int, int]]]:
        return self.of_images(call, self.grids(call))

    def tilings(self, call: Call, features: Sequence[Tensor]) -> Sequence[Tiling]:
        return [
            Tiling(
                tuple(Block((rows,), (columns,)) for rows, columns in own),
                thumbnail=self.whole(own),
            )
            for own in self.pictures(call)
        ]

    def pixels(self, call: Call) -> Sequence[Tensor]:
        return self.joined(call, self.patches(call, call.inputs[call.modality.pixels]))

    def units(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        cells, step = "(r i c j) ... -> (r c) (i j) ...", self.step
        seen = zip(self.patches(call, values), self.grids(call), strict=True)
        units = [rearrange(own, cells, i=step, c=columns, j=step) for own, (_, columns) in seen]
        return self.joined(call, units)

    def apart(self, call: Call) -> Sequence[str]:
        return list(map(str, self.pictures(call)))

    def only(self, call: Call, images: Sequence[int]) -> tuple[Sequence[int], Call]:
        counts = self.counts(call)
        own = self.of_images(call, range(sum(counts)))
        pictures = [picture for image in images for picture in own[image]]
        names = self.per_picture(call.modality) & set(call.inputs)
        some = {name: call.inputs[name][pictures] for name in names}
        parts = tuple(counts[image] for image in images)
        return images, replace(call, inputs={**call.inputs, **some}, parts=parts)
