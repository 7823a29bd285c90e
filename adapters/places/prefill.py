"""A prefill with visual tokens on its way through the text model, which it entered shortened.

The layers ask `Prefill` for their inputs, cut by cut, and show it what the methods declared;
`Prefill.finish` brings the hidden states back to the caller's length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...prune.contract import Cut, LayerSignal, Place, Pruning, Selection
from ..both_ways import BothWays
from ..cache.pruned import PrunedState
from ..patch_setup import Setup
from ..report import Last, StageReport
from ..sequence.batch import Batch, Here
from ..sequence.layout import Layout, gather_columns
from ..sequence.masks import layer_kind, layer_mask, moved_mask, stored_at, tells_length
from ..sequence.placed import PlacedImage
from ..sequence.positions import PositionIds
from ..signals.decoder import HeadsAhead, Places, Rotary
from ..signals.table import hear, shown
from .choosing import Chosen, choices
from .compression import Compression
from .forgetting import forget

Move = tuple[PlacedImage, Selection, tuple[Tensor, Tensor]]
"""An image whose rows merged or moved, what was chosen of it, and the columns that they leave and
enter."""


@dataclass
class Prefill:
    """The state of one prefill. `cache` and `state` are None where nothing is cached."""

    setup: Setup
    batch: Batch
    layout: Layout
    """The batch as it enters the current layer."""
    positions: PositionIds
    cache: Any
    state: PrunedState | None
    last: Last
    chosen: Chosen | None
    compression: Compression | None
    """What a method on the cache does behind its layers."""
    both_ways: BothWays | None = None
    """Of the caller's columns."""

    padding: Tensor | None = field(init=False)
    """Which stored and new columns of the current segment are tokens; None: all of them."""
    weights: Tensor | None = field(init=False, default=None)
    """What is added to the logits of stored and new columns of the current segment."""
    _logs: Tensor | None = field(init=False, default=None)
    """(B, L) log(size) of merged rows by the caller's column; None: nothing is added."""
    _past: dict[int, int] = field(default_factory=dict)
    """Columns stored before this prefill, per segment."""
    _projected: dict[int, Tensor] = field(default_factory=dict)
    """Key projections of a layer's input, made while choosing, that the layer need not repeat."""
    layouts: dict[int, Layout] = field(default_factory=dict)
    """The batch as it enters each segment."""
    _memo: dict[Any, Any] = field(default_factory=dict)
    _came: Tensor | None = None
    """(B, L): the caller's column in which a row entered the text model that is now in each column;
    None: its own."""
    _replayed: bool = field(init=False)
    """Whether all choices were made in an earlier step of the same generate()."""

    def __post_init__(self) -> None:
        self._replayed = bool(self.chosen)
        self._enter_segment(0)

    @property
    def images(self) -> list[PlacedImage]:
        return self.batch.images

    # --- what methods declared ---------------------------------------------------------------

    def show(self, what: str, layer: int, *values: Any) -> None:
        """Something of a layer, for those who declared to see it: see `signals.table`."""
        if needs := self._wanted(layer):
            with self._reading():
                hear(what, needs, self.batch, self.here(layer), *values)

    def keys_of(self, layer: int, given: Tensor) -> Tensor | None:
        """The key projection of `given` (B, length, D), if it was made already."""
        keys = self._projected.pop(layer, None)
        return keys if keys is not None and keys.shape[:2] == given.shape[:2] else None

    def _wanted(self, layer: int, cutting: bool = False) -> list[LayerSignal]:
        """Signals of a layer that a later cut may ask for; or one of this layer, to be made now."""
        depth = Cut(Place.DECODER, layer if cutting else layer + 1).depth
        if self._replayed or not any(
            stage.cut.depth >= depth for image in self.images for stage in image.plan
        ):
            return []
        return [need for need in self.setup.heard if need.layer == layer]

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Timed, and in float32 whatever autocast the caller is in."""
        stopwatch = self.images[0].stopwatch
        with stopwatch, torch.autocast(stopwatch.device.type, enabled=False):
            yield

    def here(self, layer: int) -> Here:
        """What rows that entered a layer see of each other and of stored columns."""
        past = self._past[self.setup.start_of(layer)]
        return self._seen(layer, past, self.padding)

    def _seen(self, layer: int, past: int, valid: Tensor | None) -> Here:
        """What rows that enter a layer see of each other and of `past` stored columns."""
        both = self._both_ways(layer)
        here = Here(self.layout, past, valid, self._window(layer))
        return here if both is None else replace(here, blocks=both.blocks, windowed=both.windowed)

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

    # --- layers ------------------------------------------------------------------------------

    def enter_layer(
        self, layer: int, module: Any, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The inputs of a decoder layer: shortened, if it is to be cut.

        The model goes on passing rotary tables, mask and positions for its first layer.
        """
        setup, start = self.setup, self.setup.start_of(layer)
        cut = any(image.stages(layer) for image in self.images)
        if layer == start and layer:
            if cut:
                hidden = self._cut(layer, module, hidden, kwargs["position_embeddings"])
            self._enter_segment(start)
        if start:
            given = kwargs["position_embeddings"]
            kwargs = {
                **kwargs,
                "position_embeddings": self._rotary(start, layer, hidden, given),
                "attention_mask": self.mask(start, layer, hidden),
                "position_ids": None,
            }
            if hidden.shape[1] < self.layout.length:
                kwargs = _of_last(kwargs, hidden.shape[1])
        if not cut:  # else `_cut` has shown it
            self.show("input", layer, hidden)
        cos, sin = kwargs["position_embeddings"]
        if not setup.rotates(layer):  # no position differs from another there
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        self.show("rotary", layer, (cos, sin))
        self.show("places", layer, self._places(layer, hidden))
        return hidden, dict(kwargs)

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

    def _places(self, layer: int, hidden: Tensor) -> Places:
        """Positions in a layer that `hidden` enters, and what it turns heads by at some of them."""
        start, like = self.setup.start_of(layer), hidden[:1, :1].float()

        def ids() -> Tensor:
            shift = None if self.state is None else self.state.segment(start).shift
            return self.positions.at(self.layout, shift)

        def tables(ids: Tensor) -> Rotary:
            cos, sin = self.setup.rotary(like, ids, layer)
            turns = self.setup.rotates(layer)  # else no position differs from another
            return (cos, sin) if turns else (torch.ones_like(cos), torch.zeros_like(sin))

        return Places(ids, tables)

    def mask(self, start: int, layer: int, hidden: Tensor) -> Any:
        """A layer's mask for the current segment, where `hidden` is its input."""
        config = self.setup.config
        key = ("mask", start, layer_kind(config, layer), hidden.device)
        if key not in self._memo:
            if stored_at(config, layer) != layer:  # on another device than the layers that store
                self._memo[key] = moved_mask(self._memo, key)
                return self._memo[key]
            both = self._both_ways(layer)
            given = self.padding, self.cache, both, self.weights
            self._memo[key] = layer_mask(config, layer, hidden, *given)
        return self._memo[key]

    def _rotary(self, start: int, layer: int, hidden: Tensor, given: Rotary) -> Rotary:
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

    def finish(self, hidden: Tensor) -> Tensor:
        """Final hidden states at the caller's length, (B, L, D); the report is complete."""
        last, images = self.last, self.images
        last.kept = [image.tokens for image in images]
        last.order = [image.order for image in images]
        last.tokens_kept = [len(image.slots) for image in images]
        last.members = [image.members for image in images]
        last.plans = [image.plan for image in images]
        missing = self.layout.length - hidden.shape[1]  # where the model drops columns itself
        return self.layout.restore(pad(hidden, (0, 0, missing, 0)) if missing else hidden)

    def _enter_segment(self, start: int) -> None:
        """The layers from `start` on store `self.layout`: record it in the cache's state."""
        self.padding, self._past[start] = self.layout.padding, 0
        self.layouts[start] = self.layout
        if self.compression is not None:
            self.compression.places[start] = [i.entries(self.layout.keep) for i in self.images]
        logs = None if self._logs is None else self.layout.shorten(self._logs)
        self.weights = logs
        if self.state is None:
            return
        past = self._past[start] = int(self.cache.physical_length(start))
        told = tells_length(self.setup.config, self.cache)
        segment = self.state.segment(start)
        self.padding = segment.enter(past, self.layout, self.positions.closed, told=told)
        self.weights = segment.weigh(past, logs)

    # --- a cut -------------------------------------------------------------------------------

    def _cut(self, layer: int, module: Any, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Let the method of this layer choose, image by image; returns the shorter input."""
        projected = self._show_uncut(layer, module, hidden, rotary)
        count = len(self.images)
        moves: list[Move] = []
        orders: list[Tensor | None] = [None] * count
        groups: list[Tensor | None] = [None] * count
        scores: list[Tensor | None] = [None] * count
        name = ""
        for stage, number, chosen in choices(self.setup, self.images, layer, self.chosen):
            image, name = self.images[number], stage.call.name
            scores[number] = image.scored(chosen.scores)
            moved = image.apply(chosen)
            image.done(layer)
            if isinstance(method := stage.call.method, Pruning) and method.proportional:
                self._weigh(image, chosen)
            plain = chosen.order is None and image.order is None
            orders[number] = None if plain else chosen.arranged
            groups[number] = chosen.groups
            if moved is not None:
                moves.append((image, chosen, moved))
        hidden = self._move(hidden, moves)
        columns = self._shorten()
        below = any(stage.cut.below for image in self.images for stage in image.stages(layer))
        if below and self.state is not None:
            stored = self.layouts, self._past
            forget(self.setup, self.cache, self.state, layer, *stored, self.layout)
        if projected is not None and not moves:
            self._projected[layer] = gather_columns(projected, columns)
        mode = self.setup.positions[Place.DECODER]
        if mode == "repacked":
            self.positions.close_up(self.layout.keep)
        self.last.stages.append(
            StageReport(
                method=name,
                place=Place.DECODER,
                layer=layer,
                kept=[image.tokens for image in self.images],
                positions=mode,
                order=orders,
                groups=groups,
                scores=scores if self.setup.record else None,
                rows=[image.order for image in self.images],
                members=[image.members for image in self.images],
                below=below,
            )
        )
        return gather_columns(hidden, columns)

    def _weigh(self, image: PlacedImage, chosen: Selection) -> None:
        """Note the sizes of an image's rows, as they were merged now."""
        if chosen.groups is None:
            return
        if self._logs is None:
            self._logs = torch.zeros(self.batch.real.shape, device=self.batch.real.device)
        sizes = chosen.groups[0].bincount(minlength=chosen.count).clamp_min(1)
        logs = sizes.to(self._logs).log()
        self._logs[image.rows[:, None], image.columns[image.slots]] = logs

    def _shorten(self) -> Tensor:
        """Go on with the images' slots; returns the columns that survive: (B, length)."""
        keep = self.layout.keep.clone()
        for image in self.images:
            image.mark(keep)
        before, self.layout = self.layout, Layout.of(keep)
        return before.then(self.layout)

    def _show_uncut(self, layer: int, module: Any, hidden: Tensor, rotary: Rotary) -> Tensor | None:
        """Show what is declared of the uncut input; the layer's key projection, if it was made."""
        if not (needs := self._wanted(layer, cutting=True)):
            return None
        before = max(start for start in self.setup.starts if start < layer)
        cos, sin = self._rotary(before, layer, hidden, rotary)
        rotary = cos.to(hidden.device), sin.to(hidden.device)
        with self._reading():
            hear("input", needs, self.batch, self.here(layer - 1), hidden)
        if not any(shown(need) == "heads ahead" for need in needs):
            return None
        with self.images[0].stopwatch:
            stored, here = self._stored(layer)
            assert self.setup.turn is not None  # noqa: S101  (for the types)
            names, turn = self.setup.names, self.setup.turn
            heads = HeadsAhead.of(module, hidden, rotary, stored, names, turn)
            with torch.no_grad():
                hear("heads ahead", needs, self.batch, here, heads)
        return heads.projected

    def _stored(self, layer: int) -> tuple[Tensor | None, Here]:
        """The keys that a layer stored before this prefill, and the batch as it is before a cut."""
        past = int(self.cache.physical_length(layer)) if self.state is not None else 0
        if self.state is None or not past:
            return None, self._seen(layer, 0, self.layout.padding)
        valid = self.state.segment(layer).extended(past, self.layout.valid)
        keys: Tensor = self.cache.layers[layer].keys[:, :, :past]
        return keys, self._seen(layer, past, valid).holding(keys.shape[2])

    def _move(self, hidden: Tensor, moves: list[Move]) -> Tensor:
        """Put merged and moved rows into their slots, and note whose tokens they are."""
        if not moves:
            return hidden
        moved, (batch, length) = hidden.clone(), self.batch.real.shape
        source = torch.arange(length, device=self.batch.real.device).repeat(batch, 1)
        for image, chosen, (left, entered) in moves:
            rows = image.rows[:, None]
            place = self.layout.place[image.rows]
            leaving, entering, batch_rows = (
                x.to(hidden.device) for x in (place[:, left], place[:, entered], rows)
            )
            states = hidden[batch_rows, leaving]
            if chosen.features is not None:
                at = torch.arange(len(left), device=hidden.device)
                at = at if chosen.rows is None else chosen.rows.to(hidden.device)
                states = states.index_copy(
                    1, at, chosen.features.to(states).expand(len(rows), -1, -1)
                )
            moved[batch_rows, entering] = states
            source[rows, entered] = left
        self.positions.move(source)
        self._came = source if self._came is None else self._came.gather(1, source)
        return moved


def _of_last(kwargs: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A layer's arguments for the last `count` columns: all that layers are given which read what
    earlier ones stored."""
    mask = kwargs["attention_mask"]
    if isinstance(mask, Tensor):
        mask = mask[..., -count:, :]
    tables = tuple(table[:, -count:] for table in kwargs["position_embeddings"])
    return {**kwargs, "attention_mask": mask, "position_embeddings": tables}
