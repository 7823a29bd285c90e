"""How pictures become smaller before the encoder sees them: two ways that families share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import nn

Count = Callable[[int], int]
"""As many tokens as are wanted, of an image that has so many."""


def _as_it_is(picture: Image.Image) -> Image.Image:
    return picture


@dataclass(frozen=True, kw_only=True)
class Smaller:
    """A processor, and what is to be done beside it.

    Attributes:
        picture: what the processor is given in place of a picture.
        interpolates: whether the encoder's learned positions are to be interpolated.
        note: what to know about the count, where it is not the one that was wanted.
    """

    processor: Any
    picture: Callable[[Image.Image], Image.Image] = _as_it_is
    interpolates: bool = False
    note: str | None = None

    @contextmanager
    def on(self, tower: nn.Module) -> Iterator[None]:
        """The encoder ready for such pictures; pictures of its own size see it as it is."""
        hooks = []
        if self.interpolates:
            embeddings = next(m for m in tower.modules() if hasattr(m, "interpolate_pos_encoding"))
            hooks.append(embeddings.register_forward_pre_hook(_interpolated, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _interpolated(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """`generate` refuses the argument, and models hand it on in some versions only."""
    return args, kwargs | {"interpolate_pos_encoding": True}


def smaller_square(config: Any, processor: Any, count: Count) -> Smaller:
    """Towers of one square picture: fewer patches of the same size, whose learned positions are
    interpolated. Of the squares s x s the one whose count is nearest, of two the smaller.

    Args:
        config: of the vision tower.
    """
    whole = config.image_size // config.patch_size
    wanted = count(whole**2)
    if wanted == whole**2:
        return Smaller(processor=processor)
    side = min(range(1, whole + 1), key=lambda s: abs(s * s - wanted))
    scaled, pixels = copy.deepcopy(processor), side * config.patch_size
    for name in ("size", "crop_size"):
        old = getattr(scaled.image_processor, name, None)
        if old is not None:
            setattr(scaled.image_processor, name, _with_sides(old, pixels))
    return Smaller(
        processor=scaled,
        interpolates=True,
        note=None
        if side**2 == wanted
        else f"{wanted} tokens are no square: {side} x {side} = {side**2} is the nearest.",
    )


def smaller_grid(processor: Any, count: Count) -> Smaller:
    """Pictures of any size between `min_pixels` and `max_pixels`, as Qwen's processors take them.

    A picture gets the grid with the count nearest to the wanted one, of those that keep its
    proportions but for rounding and that the processor does not scale again.
    """
    images = processor.image_processor
    unit = images.patch_size * images.merge_size
    least = math.ceil(images.size["shortest_edge"] / unit**2)

    def resized(picture: Image.Image) -> Image.Image:
        width, height = picture.size
        patches = images.get_number_of_image_patches(height, width)
        tokens = patches // images.merge_size**2
        wanted = count(tokens)
        if wanted >= tokens:
            return picture
        rows, columns = nearest_grid(height / width, max(wanted, least), least)
        if rows * columns >= tokens:  # the limit leaves nothing to take away
            return picture
        return picture.resize((columns * unit, rows * unit), Image.Resampling.BICUBIC)

    return Smaller(processor=processor, picture=resized)


def nearest_grid(shape: float, wanted: int, least: int = 1) -> tuple[int, int]:
    """Rows and columns of a picture whose height is `shape` of its width: its exact sides for
    `wanted` tokens (of a very thin one a single row or column), each rounded up or down, that
    together come nearest to it.

    Args:
        least: no grid has fewer tokens; at most `wanted`.
    """
    rows = min(max(1.0, math.sqrt(wanted * shape)), wanted)
    sides = rows, wanted / rows
    high, wide = ({max(1, math.floor(side)), max(1, math.ceil(side))} for side in sides)
    grids = [(r, c) for r in sorted(high) for c in sorted(wide) if r * c >= least]

    def off(grid: tuple[int, int]) -> tuple[int, float]:
        return abs(grid[0] * grid[1] - wanted), abs(math.log(grid[0] / grid[1] / shape))

    return min(grids, key=off)


def _with_sides(size: Any, pixels: int) -> Any:
    """A processor's size with other sides, under the names that it has."""
    named = dict(size) if isinstance(size, Mapping) else vars(size)
    new = {name: pixels for name, value in named.items() if value is not None}
    return new if isinstance(size, dict) else type(size)(**new)
