"""What the layers of a prefill are given and see, as rows leave between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...prune.contract import Selection
from ..both_ways import BothWays
from ..cache.pruned import PrunedState
from ..patch_setup import Setup
from ..sequence.batch import Batch, Here
from ..sequence.layout import Layout, gather_columns
from ..sequence.masks import layer_kind, layer_mask, moved_mask, stored_at, tells_length
from ..sequence.placed import PlacedImage
from ..sequence.positions import PositionIds
from ..signals.decoder import Angles, Rotary


@dataclass
class LayerInputs:
    """Masks, positions and rows for the layers of the current segment, and what each has stored.

    `cache` and `state` are None where nothing is cached.
    """

    setup: Setup
    batch: Batch
    layout: Layout
    """The batch as it enters the current layer."""
    positions: PositionIds
    cache: Any
    state: PrunedState | None
    both_ways: BothWays | None = None
    """Of the caller's columns."""

    padding: Tensor | None = field(init=False)
    """Which stored and new columns of the current segment are tokens; None: all of them."""
    layouts: dict[int, Layout] = field(default_factory=dict)
    """The batch as it enters each segment."""
    past: dict[int, int] = field(default_factory=dict)
    """Columns stored before this prefill, per segment."""
    _weights: Tensor | None = field(init=False, default=None)
    """What is added to the logits of stored and new columns of the current segment."""
    _logs: Tensor | None = field(init=False, default=None)
    """(B, L) log(size) of merged rows by the caller's column; None: nothing is added."""
    _memo: dict[Any, Any] = field(default_factory=dict)
    _came: Tensor | None = None
    """(B, L): the caller's column in which a row entered the text model that is now in each column;
    None: its own."""

    # --- from cut to cut ---------------------------------------------------------------------

    def enter(self, start: int) -> None:
        """The layers from `start` on store `self.layout`: record it in the cache's state."""
        self.padding, self.past[start] = self.layout.padding, 0
        self.layouts[start] = self.layout
        logs = None if self._logs is None else self.layout.shorten(self._logs)
        self._weights = logs
        if self.state is None:
            return
        past = self.past[start] = int(self.cache.physical_length(start))
        told = tells_length(self.setup.config, self.cache)
        segment = self.state.segment(start)
        self.padding = segment.enter(past, self.layout, self.positions.closed, told=told)
        self._weights = segment.weigh(past, logs)

    def shorten(self) -> Tensor:
        """Go on with the images' slots; returns the columns that survive: (B, length)."""
        keep = self.layout.keep.clone()
        for image in self.batch.images:
            image.mark(keep)
        before, self.layout = self.layout, Layout.of(keep)
        return before.then(self.layout)

    def weigh(self, image: PlacedImage, chosen: Selection) -> None:
        """Note the sizes of an image's rows, as they were merged now."""
        if chosen.groups is None:
            return
        if self._logs is None:
            self._logs = torch.zeros(self.batch.real.shape, device=self.batch.real.device)
        sizes = chosen.groups[0].bincount(minlength=chosen.count).clamp_min(1)
        logs = sizes.to(self._logs).log()
        self._logs[image.rows[:, None], image.columns[image.slots]] = logs

    def move(self, source: Tensor) -> None:
        """The row of each column is the one that was in column `source` (B, L)."""
        self.positions.move(source)
        self._came = source if self._came is None else self._came.gather(1, source)

    # --- what rows see -----------------------------------------------------------------------

    def here(self, layer: int) -> Here:
        """What rows that entered a layer see of each other and of stored columns."""
        past = self.past[self.setup.start_of(layer)]
        return self.seen(layer, past, self.padding)

    def seen(self, layer: int, past: int, valid: Tensor | None) -> Here:
        """What rows that enter a layer see of each other and of `past` stored columns."""
        both = self._both_ways(layer)
        here = Here(self.layout, past, valid, self._window(layer))
        return here if both is None else replace(here, blocks=both.blocks, windowed=both.windowed)

    def stored(self, layer: int) -> tuple[Tensor | None, Here]:
        """The keys that a layer stored before this prefill, and the batch as it is before a cut."""
        past = int(self.cache.physical_length(layer)) if self.state is not None else 0
        if self.state is None or not past:
            return None, self.seen(layer, 0, self.layout.padding)
        valid = self.state.segment(layer).extended(past, self.layout.valid)
        keys: Tensor = self.cache.layers[layer].keys[:, :, :past]
        return keys, self.seen(layer, past, valid).holding(keys.shape[2])

    def _both_ways(self, layer: int) -> BothWays | None:
        """Of the columns that enter a layer, (B, length)."""
        both = self.both_ways
        if both is None or layer_kind(self.setup.config, layer) not in both.kinds:
            return None
        own = self.layout.shorten(both.blocks).masked_fill(~self.layout.valid, -1)
        return replace(both, blocks=own)

    def _window(self, layer: int) -> int | None:
        sliding = layer_kind(self.setup.config, layer) == "sliding_attention"
        return self.setup.config.sliding_window if sliding else None

    def visual_alive(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Where visual tokens are in the current layer, and which ones of the caller's they are.

        A row that was merged or moved is the token that it stands for, or that of its slot.

        Args:
            visual: (B, L) bool, the placeholders in the caller's sequence.

        Returns:
            (B, length) bool, and numbers (rows,) among the placeholders in the order of the batch.
        """
        number = visual.flatten().cumsum(0).view_as(visual) - 1
        if (source := self.positions.source) is not None:
            number = number.gather(1, source.to(number.device))
        here = self.layout.shorten(visual) & self.layout.valid.to(visual.device)
        return here, self.layout.shorten(number)[here]

    # --- what a layer is given ---------------------------------------------------------------

    def given(self, layer: int, hidden: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Its keyword arguments, where `hidden` is its input. The model goes on passing rotary
        tables, mask and positions for its first layer."""
        if not (start := self.setup.start_of(layer)):
            return dict(kwargs)
        kwargs = {
            **kwargs,
            "position_embeddings": self.rotary(start, layer, hidden, kwargs["position_embeddings"]),
            "attention_mask": self.mask(start, layer, hidden),
            "position_ids": None,
        }
        left_out = hidden.shape[1] < self.layout.length
        return _of_last(kwargs, hidden.shape[1]) if left_out else kwargs

    def rows(self, layer: int, given: Any) -> Any:
        """What a layer is given beside its input, where it has a row for each one that entered the
        text model, (B, length, ...)."""
        start, first = self.setup.start_of(layer), self.layouts[0]
        # A model that goes on with the last column alone has taken its row out.
        if not start or not isinstance(given, Tensor) or given.shape[1] != first.length:
            return given
        if ("rows", start) not in self._memo:
            columns = self.layouts[start].columns
            came = columns if self._came is None else self._came.gather(1, columns)
            self._memo["rows", start] = first.place.gather(1, came)
        return gather_columns(given, self._memo["rows", start])

    def mask(self, start: int, layer: int, hidden: Tensor) -> Any:
        """A layer's mask for the current segment, where `hidden` is its input."""
        config = self.setup.config
        key = ("mask", start, layer_kind(config, layer), hidden.device)
        if key not in self._memo:
            if stored_at(config, layer) != layer:  # on another device than the layers that store
                self._memo[key] = moved_mask(self._memo, key)
                return self._memo[key]
            both = self._both_ways(layer)
            given = self.padding, self.cache, both, self._weights
            self._memo[key] = layer_mask(config, layer, hidden, *given)
        return self._memo[key]

    def rotary(self, start: int, layer: int, hidden: Tensor, given: Rotary) -> Rotary:
        """A layer's tables for a segment, (B, length, D_head) each; `given` are those of the
        first."""
        if not start:
            return given
        key = ("rotary", start, self.setup.rotary_kind(layer), hidden.device)
        if key not in self._memo:
            shift = None if self.state is None else self.state.segment(start).shift
            ids = self.positions.at(self.layout, shift)
            self._memo[key] = self.setup.rotary(hidden, ids, layer)
        return self._memo[key]

    def angles(self, layer: int, hidden: Tensor) -> Angles:
        """Positions in a layer that `hidden` enters, and what it turns heads by at some of them."""
        start, like = self.setup.start_of(layer), hidden[:1, :1].float()

        def ids() -> Tensor:
            shift = None if self.state is None else self.state.segment(start).shift
            return self.positions.at(self.layout, shift)

        def tables(ids: Tensor) -> Rotary:
            cos, sin = self.setup.rotary(like, ids, layer)
            turns = self.setup.rotates(layer)  # else no position differs from another
            return (cos, sin) if turns else (torch.ones_like(cos), torch.zeros_like(sin))

        return Angles(ids, tables)


def _of_last(kwargs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A layer's arguments for the last `count` columns: all that layers are given which read what
    earlier ones stored."""
    mask = kwargs["attention_mask"]
    if isinstance(mask, Tensor):
        mask = mask[..., -count:, :]
    tables = tuple(table[:, -count:] for table in kwargs["position_embeddings"])
    return {**kwargs, "attention_mask": mask, "position_embeddings": tables}
