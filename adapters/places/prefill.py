"""A prefill with visual tokens on its way through the text model, which it entered shortened.

The layers ask `Prefill` for their inputs, cut by cut, and show it what the methods declared;
`Prefill.finish` brings the hidden states back to the caller's length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...prune.contract import Cut, LayerSignal, Place, Pruning, Selection
from ..patch_setup import Setup
from ..report import Last, StageReport
from ..sequence.layout import gather_columns
from ..sequence.placed import PlacedImage
from ..signals.decoder import HeadsAhead, Rotary
from ..signals.table import hear, shown
from .alive_heads import AliveHeads
from .choosing import Chosen, choices
from .compression import Compression
from .forgetting import forget
from .layer_inputs import LayerInputs

Move = tuple[PlacedImage, Selection, tuple[Tensor, Tensor]]
"""An image whose rows merged or moved, what was chosen of it, and the columns that they leave and
enter."""


@dataclass
class Prefill:
    """One prefill: what methods declared is read, they choose, and rows leave."""

    inputs: LayerInputs
    last: Last
    chosen: Chosen | None
    compression: Compression | None
    """What a method on the cache does behind its layers."""
    _projected: dict[int, Tensor] = field(default_factory=dict)
    """Key projections of a layer's input, made while choosing, that the layer need not repeat."""
    heads: AliveHeads = field(default_factory=AliveHeads)
    _replayed: bool = field(init=False)
    """Whether all choices were made in an earlier step of the same generate()."""

    def __post_init__(self) -> None:
        self._replayed = bool(self.chosen)
        self._enter_segment(0)

    @property
    def setup(self) -> Setup:
        return self.inputs.setup

    @property
    def images(self) -> list[PlacedImage]:
        return self.inputs.batch.images

    def _enter_segment(self, start: int) -> None:
        self.inputs.enter(start)
        if self.compression is not None:
            keep = self.inputs.layout.keep
            self.compression.rows[start] = [image.entries(keep) for image in self.images]

    # --- what methods declared ---------------------------------------------------------------

    def show(self, what: str, layer: int, *values: Any) -> None:
        """Something of a layer, for those who declared to see it: see `signals.table`."""
        if needs := self._wanted(layer):
            with self._reading():
                hear(what, needs, self.inputs.batch, self.inputs.here(layer), *values)

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

    # --- from beginning to end ---------------------------------------------------------------

    def enter_layer(
        self, layer: int, module: Any, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The inputs of a decoder layer: shortened, if it is to be cut."""
        setup, start = self.setup, self.setup.start_of(layer)
        cut = any(image.stages(layer) for image in self.images)
        if layer == start and layer:
            if cut:
                hidden = self._cut(layer, module, hidden, kwargs["position_embeddings"])
            self._enter_segment(start)
        given = self.inputs.given(layer, hidden, kwargs)
        if not cut:  # else `_cut` has shown it
            self.show("input", layer, hidden)
        cos, sin = given["position_embeddings"]
        if not setup.rotates(layer):  # no position differs from another there
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        self.show("rotary", layer, (cos, sin))
        self.show("angles", layer, self.inputs.angles(layer, hidden))
        return hidden, given

    def finish(self, hidden: Tensor) -> Tensor:
        """Final hidden states at the caller's length, (B, L, D); the report is complete."""
        last, images = self.last, self.images
        last.kept = [image.tokens for image in images]
        last.order = [image.order for image in images]
        last.tokens_kept = [len(image.slots) for image in images]
        last.members = [image.members for image in images]
        last.plans = [image.plan for image in images]
        layout = self.inputs.layout
        missing = layout.length - hidden.shape[1]  # where the model drops columns itself
        return layout.restore(pad(hidden, (0, 0, missing, 0)) if missing else hidden)

    # --- a cut -------------------------------------------------------------------------------

    def _cut(self, layer: int, module: Any, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Let the method of this layer choose, image by image; returns the shorter input."""
        projected = self._show_uncut(layer, module, hidden, rotary)
        inputs, count = self.inputs, len(self.images)
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
                inputs.weigh(image, chosen)
            plain = chosen.order is None and image.order is None
            orders[number] = None if plain else chosen.arranged
            groups[number] = chosen.groups
            if moved is not None:
                moves.append((image, chosen, moved))
        hidden = self._move(hidden, moves)
        columns = inputs.shorten()
        below = any(stage.cut.below for image in self.images for stage in image.stages(layer))
        if below and inputs.state is not None:
            stored = inputs.layouts, inputs.past
            forget(self.setup, inputs.cache, inputs.state, layer, *stored, inputs.layout)
        if projected is not None and not moves:
            self._projected[layer] = gather_columns(projected, columns)
        mode = self.setup.positions[Place.DECODER]
        if mode == "repacked":
            inputs.positions.close_up(inputs.layout.keep)
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

    def _show_uncut(self, layer: int, module: Any, hidden: Tensor, rotary: Rotary) -> Tensor | None:
        """Show what is declared of the uncut input; the layer's key projection, if it was made."""
        if not (needs := self._wanted(layer, cutting=True)):
            return None
        before = max(start for start in self.setup.starts if start < layer)
        cos, sin = self.inputs.rotary(before, layer, hidden, rotary)
        rotary = cos.to(hidden.device), sin.to(hidden.device)
        with self._reading():
            hear("input", needs, self.inputs.batch, self.inputs.here(layer - 1), hidden)
        if not any(shown(need) == "heads ahead" for need in needs):
            return None
        with self.images[0].stopwatch:
            stored, here = self.inputs.stored(layer)
            assert self.setup.turn is not None  # noqa: S101  (for the types)
            names, turn = self.setup.names, self.setup.turn
            heads = HeadsAhead.of(module, hidden, rotary, stored, names, turn)
            with torch.no_grad():
                hear("heads ahead", needs, self.inputs.batch, here, heads)
        return heads.projected

    def _move(self, hidden: Tensor, moves: list[Move]) -> Tensor:
        """Put merged and moved rows into their slots, and note whose tokens they are."""
        if not moves:
            return hidden
        moved, real = hidden.clone(), self.inputs.batch.real
        source = torch.arange(real.shape[1], device=real.device).repeat(len(real), 1)
        for image, chosen, (left, entered) in moves:
            rows = image.rows[:, None]
            place = self.inputs.layout.place[image.rows]
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
        self.inputs.move(source)
        return moved
