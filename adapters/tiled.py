"""Families whose encoder sees an image as several pictures of one size, which only the prompt tells
apart from those of other images."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from einops import rearrange
from torch import Tensor

from ..prune.errors import UnsupportedFeatureError
from ..prune.tiling import Block, Tiling
from .family import Call
from .merged import Merged
from .sequence.prompt import Prompt


class Tiled(Merged):
    """An image is a run of tiles, where it is more than one the whole picture among them.

    The tokens of a tile lie side by side, each made of `step` x `step` patches; where crops lie in
    the picture is not known. Encoded without a prompt, each tile counts as an image.
    """

    of_prompt = True
    whole_picture: ClassVar[Literal["first", "last"]] = "last"
    """Which tile of several shows all of the picture."""
    dropped: ClassVar[str] = ""
    """What an error adds about tiles that the model does not see."""

    @abstractmethod
    def separates(self, gap: Sequence[int], behind: Sequence[int]) -> bool:
        """Whether the ids between two tiles of a prompt stand between two images.

        Args:
            behind: the ids behind the last tile.
        """

    def tiles(self, call: Call) -> Tensor:
        """All tiles of a call without padding: (tiles, 3, H, W)."""
        pixels: Tensor = call.inputs[call.modality.pixels]
        return pixels

    def num_tiles(self, call: Call) -> int:
        return len(self.tiles(call))

    def grid(self, call: Call) -> tuple[int, int]:
        """Rows and columns of the tokens of a tile."""
        size = self.vision_tower.config.patch_size
        height, width = (size, size) if isinstance(size, int) else size
        rows, columns = call.inputs[call.modality.pixels].shape[-2:]
        return rows // height // self.step, columns // width // self.step

    # --- which tiles are an image --------------------------------------------------------------

    def parts(self, call: Call, prompt: Prompt) -> tuple[int, ...]:
        rows, columns = self.grid(call)
        token, unit = prompt.placeholders[call.modality], rows * columns
        found: list[int] = []
        for ids in prompt.rows():
            at = (ids == token).nonzero()[:, 0].tolist()
            if len(at) % unit:
                raise self._unlike(call, sum(found), f"{len(at)} placeholders in a prompt")
            found += self._images_of(ids.tolist(), at[::unit], unit)
        if sum(found) != self.num_tiles(call):
            raise self._unlike(call, self.num_tiles(call), f"placeholders for {sum(found)}")
        return tuple(found)

    def _images_of(self, ids: list[int], firsts: list[int], unit: int) -> Iterator[int]:
        """Tiles of each image of a prompt, from the first columns of all tiles."""
        count = 0
        for first, following in pairwise([*firsts, len(ids)] if firsts else []):
            count += 1
            behind = ids[firsts[-1] + unit :]
            if following == len(ids) or self.separates(ids[first + unit : following], behind):
                yield count
                count = 0

    def _unlike(self, call: Call, tiles: int, placeholders: str) -> UnsupportedFeatureError:
        rows, columns = self.grid(call)
        return UnsupportedFeatureError(
            f"{tiles} {call.modality.name} tiles of {rows} x {columns} tokens came with "
            f"{placeholders}: input_ids and {call.modality.name}s do not belong together"
            f"{self.dropped}."
        )

    def counts(self, call: Call) -> Sequence[int]:
        """Tiles of each image."""
        return (1,) * self.num_tiles(call) if call.parts is None else call.parts

    # --- images and back -----------------------------------------------------------------------

    def images(self, call: Call, pooled: Sequence[Tensor]) -> Sequence[Tensor]:
        rows, columns = self.grid(call)
        tokens = torch.cat(list(pooled))
        return tokens.split([count * rows * columns for count in self.counts(call)])

    def pooled(self, call: Call, images: Sequence[Tensor], kind: type) -> Any:
        rows, columns = self.grid(call)
        return torch.cat(list(images)).unflatten(0, (-1, rows * columns))

    def tilings(self, call: Call, features: Sequence[Tensor]) -> Sequence[Tiling]:
        rows, columns = self.grid(call)
        tile, last = Block((rows,), (columns,)), self.whole_picture == "last"
        return [
            Tiling((tile,) * count, thumbnail=last * (count - 1) if count > 1 else None)
            for count in self.counts(call)
        ]

    def pixels(self, call: Call) -> Sequence[Tensor]:
        return self.tiles(call).split(list(self.counts(call)))

    def pictures(self, call: Call) -> Sequence[Sequence[tuple[int, int]]]:
        return [[self.grid(call)] * count for count in self.counts(call)]

    def units(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        (rows, columns), step = self.grid(call), self.step
        units = rearrange(
            values[:, self.tower.prefix :],
            "t (r i c j) ... -> t (r c) (i j) ...",
            r=rows,
            i=step,
            c=columns,
            j=step,
        )
        return [tiles.flatten(0, 1) for tiles in units.split(list(self.counts(call)))]

    def only(self, call: Call, images: Sequence[int]) -> tuple[Sequence[int], Call]:
        taken, chosen = super().only(call, images)
        counts = self.counts(call)
        return taken, replace(chosen, parts=tuple(counts[i] for i in taken))
