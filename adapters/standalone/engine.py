"""The machinery between an image encoder and the method inside it.

The encoder's own method that takes pixels begins a passage, the hooks of `places.encoder` shorten
rows in its blocks, and what pools them afterwards is told how many patches each row stands for.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...prune.budget import MethodCall
from ...prune.contract import InEncoder, Positions
from ...prune.errors import BudgetError, UnsupportedFeatureError
from ..budgets import Budgets
from ..checks.patches import refuse_compiled
from ..clip_text import ClipText
from ..hooks import Undo, before, shadow
from ..image_model import ImageModel
from ..installed import Installed
from ..patch_setup import Setup
from ..places.call import Calling
from ..places.encoder import EncoderDriver
from ..places.padded import PaddedPassage
from ..places.passage import Passage
from ..places.picture import Picture
from ..report import DISABLED, Last
from .checks import check_budget, refuse_call, refuse_llm_options, refuse_maps
from .prepare import check_counts, counts_of, make_setup
from .report import report

SIZES = "_vlmprune_sizes"
"""Attribute of shortened rows that a later method of the encoder pools: what is added to logits."""


class Pass(Calling):
    """The pass of one thread, and what its last one left for pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.report: Callable[[], Last] | None = None
        """Makes `last`, when somebody asks."""
        self.rows: tuple[int, int] | None = None
        """Pictures and rows of the last pass, prefix included, if rows stand for several."""
        self.bias: Tensor | None = None
        """Of the rows that are pooled now."""


class ImageEngine(Installed):
    """Everything that `patch` installs on an image encoder."""

    _flight: Pass

    def __init__(self, model: ImageModel, setup: Setup) -> None:
        super().__init__(model.model, setup)
        self._images, self._flight = model, Pass()
        self.fit = "crop" if model.crops else "stretch"
        blocks = model.encoder.blocks
        attention = [block.attention for block in blocks]
        self._encoder = EncoderDriver(attention, [], self._names, model.encoder)
        self._start([self._encoder])

    def _install_own(self) -> Iterator[Undo]:
        images, tower = self._images, self._images.tower
        yield shadow(tower, images.entry, self._run)
        for name in images.full:
            yield shadow(tower, name, functools.partial(self._map, name))
        if (pooling := images.pooling) is not None:
            yield shadow(tower, pooling.__name__, self._pool)
        if (pool := images.attention_pool) is not None:
            yield before(pool, self._before_pool, with_kwargs=True)

    # --- what calls run with ------------------------------------------------------------------

    def planned(
        self,
        calls: tuple[MethodCall, ...],
        positions: Positions | None,
        clip: ClipText | None,
    ) -> Setup:
        refuse_llm_options(positions, clip, 0)
        return make_setup(self._images, calls)

    def check(self, budgets: Budgets) -> Setup:
        if budgets.per_image:
            raise BudgetError(
                "A list gives each picture its own number of rows, and the pictures of a batch "
                "leave an image encoder with as many each: give one budget."
            )
        check_budget(budgets.each[0], type(self.model).__name__)
        applied = budgets.applied(self.setup)
        check_counts(applied, self._images)
        return applied

    def refuse_compiled(self) -> None:
        refuse_compiled(self.model, self._images.tower)

    @property
    def last(self) -> Last | None:
        flight = self._flight
        if flight.report is not None:
            flight.last, flight.report = flight.report(), None
        return flight.last

    # --- a call -------------------------------------------------------------------------------

    # Compiled code of one block would be used for others, which have other hooks.
    @torch.compiler.disable
    def _run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The encoder's method that takes pixels."""
        passage = self._begin(original, args, kwargs)
        if passage is None:
            return original(*args, **kwargs)
        with self._encoder.read({}, frozenset(), passage):
            output = original(*args, **kwargs)
        return self._end(passage, output)

    def _begin(
        self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Passage | None:
        """What leaves in this call; None: nothing."""
        flight, images = self._flight, self._images
        flight.last = flight.report = flight.rows = None
        setup = self.wanted()
        if setup is None:
            flight.last = Last.nothing("original", 0, DISABLED)
            return None
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        inputs = {**bound, **bound.get("kwargs", {})}
        pixels: Tensor = inputs[images.pixels]
        grid, count = images.grid(pixels), len(pixels)
        counts = counts_of(setup, grid)
        passage = None
        if counts is not None:
            method = setup.in_encoder
            assert method is not None  # noqa: S101  (for the types)
            refuse_call(images, method, inputs)
            passage = self._passage(setup, method, [_picture(grid, counts)] * count, pixels.device)
        flight.report = functools.partial(report, setup, grid, count, passage)
        return passage

    def _passage(
        self, setup: Setup, method: InEncoder, pictures: list[Picture], device: torch.device
    ) -> PaddedPassage:
        encoder = self._images.encoder
        return PaddedPassage(
            method,
            setup.shape.tower,
            pictures,
            device,
            prefix=encoder.prefix,
            unit=encoder.unit,
            debug=setup.debug,
        )

    def _end(self, passage: Passage, output: Any) -> Any:
        bias = self._sizes(passage)
        if bias is None:
            return output
        if self._images.pooling is None:
            return self._images.weighed(output, bias)
        self._flight.rows = bias.shape[0], bias.shape[-1]
        setattr(output, SIZES, bias)
        return output

    def _sizes(self, passage: Passage) -> Tensor | None:
        """What attention adds for the rows that are left behind the last block."""
        if passage.method.restores:
            return None
        passage.prepare_bias(passage.prefix + max(passage.counts))
        return passage.bias

    # --- pooling ------------------------------------------------------------------------------

    @torch.compiler.disable
    def _pool(self, original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The encoder's method that pools rows."""
        flight, images = self._flight, self._images
        bias = None
        if images.pools_by_size(original, x, *args, **kwargs):
            bias = self._of_rows(x)
        if bias is None:
            return original(x, *args, **kwargs)
        if images.attention_pool is not None:
            flight.bias = bias
            try:
                return original(x, *args, **kwargs)
            finally:
                flight.bias = None
        return images.pooled(original, x, bias, *args, **kwargs)

    def _of_rows(self, x: Tensor) -> Tensor | None:
        """How many patches stand behind rows that are pooled now; None: one behind each."""
        bias: Tensor | None = getattr(x, SIZES, None)
        if bias is None and self._flight.rows == tuple(x.shape[:2]):
            raise UnsupportedFeatureError(
                "These rows stand for several patches each, and nothing is known of how many: "
                "hand what forward_features returned to forward_head or pool as it is, or call "
                "both in handle.disabled()."
            )
        return bias

    def _before_pool(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        bias, passage = self._flight.bias, self._encoder.passage
        if bias is None and passage is not None:
            bias = self._sizes(passage)
        if bias is None or kwargs is None:
            return None
        rows = args[1] if len(args) > 1 else args[0]
        return args, self._images.biased(kwargs, bias.to(rows.dtype), rows)

    @torch.compiler.disable
    def _map(self, name: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """A method of the encoder that returns maps of all patches, behind some blocks."""
        self._refuse_map(name, original, args, kwargs)
        return self._run(original, *args, **kwargs)

    def _refuse_map(
        self,
        name: str,
        original: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        """Refuse maps of blocks behind which rows are missing."""
        setup = self.wanted()
        method = None if setup is None else setup.in_encoder
        if setup is None or method is None:
            return
        inputs = inspect.signature(original).bind(*args, **kwargs).arguments
        if counts_of(setup, self._images.grid(inputs[self._images.pixels])) is None:
            return
        depth = setup.shape.tower.depth_read
        first = method.blocks(setup.shape.tower)[0].block
        asked = _blocks(inputs.get("indices"), depth)
        if not method.restores or any(first <= block < depth - 1 for block in asked):
            raise refuse_maps(name, method, first)


def _blocks(indices: Any, depth: int) -> list[int]:
    """The blocks that `indices` of timm means: the last so many, all, or these."""
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        return list(range(depth - indices, depth))
    return [index % depth for index in indices]


def _picture(grid: tuple[int, int], counts: tuple[int, ...]) -> Picture:
    return Picture(total=grid[0] * grid[1], grid=grid, counts=counts)
