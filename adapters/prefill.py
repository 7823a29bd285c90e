"""A prefill with visual tokens on its way through the text model, which it enters shortened.

`begin` shortens the text model's inputs; then the layers ask `Prefill` for theirs, cut by cut;
`Prefill.restore` brings the hidden states back to the caller's length.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..prune.contract import TextAttention, Positions, Signal, VisualTokens
from ..prune.errors import UnsupportedFeatureError
from . import probes
from .cache import PrunedState, make_pruned, pruned_state
from .encoding import Encoded, EncodedImage, choose
from .family import Modality
from .masks import layer_kind, layer_mask
from .report import Last, StageReport, Stopwatch
from .sequence import Layout, gather_columns
from .setup import Setup

Chosen = dict[tuple[int, int], Tensor]
"""What each cut (layer, number of the image) left alive, within one generate()."""


@dataclass
class PlacedImage:
    """An image or video in the batch. `rows` are its sample's rows (several under beam search)."""

    encoded: EncodedImage
    sample: int
    rows: Tensor
    columns: Tensor
    """Columns of its placeholders in the caller's sequence, (N,)."""
    alive: Tensor
    """Slots that are alive so far, numbers of placeholders, ascending."""
    stopwatch: Stopwatch

    def mark(self, keep: Tensor, alive: Tensor) -> None:
        """Make exactly `alive` of this image's tokens survive in `keep` (B, L), in place."""
        rows = self.rows[:, None]
        keep[rows, self.columns[self.alive]] = False
        keep[rows, self.columns[alive]] = True
        self.alive = alive

    @property
    def tokens(self) -> Tensor:
        """Numbers of the tokens alive, ascending."""
        return self.encoded.tokens_at(self.alive)


@dataclass
class Prefill:
    """The state of one prefill. `cache` and `state` are None where nothing is cached."""

    setup: Setup
    images: list[PlacedImage]
    length: int
    """L of the caller's sequence."""
    first: Layout
    """The batch as it enters layer 0."""
    cache: Any
    state: PrunedState | None
    last: Last
    chosen: Chosen | None

    layout: Layout = field(init=False)
    """The batch as it enters the current layer."""
    padding: Tensor | None = field(init=False)
    """Which stored and new columns of the current segment are tokens; None: all of them."""
    _past: dict[int, int] = field(default_factory=dict)
    """Columns stored before this prefill, per segment."""
    _rows: dict[int, Tensor] = field(default_factory=dict)
    """Attention of the last token to the current columns, by the layer it was read in."""
    _memo: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = self.first
        self._enter_segment(0)

    def cuts_at(self, layer: int) -> bool:
        return any(stage.layer == layer for image in self.images for stage in image.encoded.plan)

    def hear(self, layer: int, query: Tensor, key: Tensor, mask: Any, scaling: float) -> None:
        """Read the last token's attention in `layer`, where the next layer is to be cut."""
        if self.cuts_at(layer + 1):
            past = self._past[self.setup.start_of(layer)]
            row = probes.last_row(query, key, mask, scaling, past + self.layout.length)
            self._rows[layer] = row[:, past:]

    def enter_layer(
        self, layer: int, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The inputs of a decoder layer behind the first cut, which may be this layer's own.

        The model goes on passing rotary tables, mask and positions for its first layer.
        """
        setup, start = self.setup, self.setup.start_of(layer)
        if layer == start:
            before = self.layout
            if self.cuts_at(layer):
                self.layout = self._cut(layer)
                hidden = gather_columns(hidden, before.then(self.layout))
            self._enter_segment(start)
        cos, sin = kwargs["position_embeddings"]
        rotary, mask = ("rotary", start, id(cos)), ("mask", start, layer_kind(setup.config, layer))
        if rotary not in self._memo:
            columns = self.first.then(self.layout)
            self._memo[rotary] = (gather_columns(cos, columns), gather_columns(sin, columns))
        if mask not in self._memo:
            self._memo[mask] = layer_mask(setup.config, layer, hidden, self.padding, self.cache)
        return hidden, {
            **kwargs,
            "position_embeddings": self._memo[rotary],
            "attention_mask": self._memo[mask],
            "position_ids": None,
        }

    def visual_alive(self, visual: Tensor) -> tuple[Tensor, Tensor]:
        """Where visual tokens are in the current layer, and which ones of the caller's they are.

        A row that was merged or moved is the token that it stands for, or that of its slot.

        Args:
            visual: (B, L) bool, the placeholders in the caller's sequence.

        Returns:
            (B, length) bool, and numbers (rows,) among the placeholders in the order of the batch.
        """
        number = visual.flatten().cumsum(0).view_as(visual) - 1
        moved = _moved(self.images, *visual.shape)
        if moved is not None:
            number = number.gather(1, moved.to(number.device))
        here = self.layout.shorten(visual) & self.layout.valid
        return here, self.layout.shorten(number)[here]

    def restore(self, hidden: Tensor) -> Tensor:
        """Final hidden states at the caller's length, (B, L, D)."""
        _report_alive(self.last, self.images)
        return self.layout.restore(hidden)

    def _enter_segment(self, start: int) -> None:
        """The layers from `start` on store `self.layout`: record it in the cache's state."""
        self.padding, self._past[start] = self.layout.padding, 0
        if self.state is None:
            return
        segment = self.state.segment(start)
        past = self._past[start] = int(self.cache.physical_length(start))
        if self.padding is not None or segment.padding is not None:
            self.padding = segment.extended(past, self.layout.valid)
        segment.padding = self.padding
        segment.dropped += self.length - self.layout.length

    def _cut(self, layer: int) -> Layout:
        """Let the method of this layer choose, image by image; returns the shorter layout."""
        keep = self.layout.keep.clone()
        name = ""
        for number, image in enumerate(self.images):
            stage = next((s for s in image.encoded.plan if s.layer == layer), None)
            if stage is None:
                continue
            name = stage.call.name
            alive = (self.chosen or {}).get((layer, number))
            if alive is None:
                row = image.rows[0]
                place = self.layout.place[row, image.columns[image.alive]]
                signals: dict[Signal, Tensor] = {
                    need: self._rows[need.layer][row, place]
                    for need in stage.call.method.needs(self.setup.shape)
                    if isinstance(need, TextAttention) and need.layer in self._rows
                }
                tokens = VisualTokens(
                    num_tokens=len(image.alive),
                    tiling=image.encoded.tiling,
                    shape=self.setup.shape,
                    signals=signals,
                    alive=image.alive,
                )
                alive = image.alive[choose(stage, tokens, image.stopwatch).kept]
            if self.chosen is not None:
                self.chosen[layer, number] = alive
            image.mark(keep, alive)
        self.last.stages.append(StageReport(name, layer, [i.tokens for i in self.images]))
        return Layout.of(keep)


def begin(
    setup: Setup,
    encoded: Mapping[Modality, Encoded],
    visual: Mapping[Modality, Tensor],
    kwargs: dict[str, Any],
    chosen: Chosen | None,
) -> tuple[Prefill | None, Last]:
    """Shorten the text model's keyword arguments, in place.

    Args:
        visual: (B, L) bool, the columns of the placeholders of each modality.
        kwargs: arguments of the text model.
        chosen: selections made earlier in the same generate(), reused and added to.

    Returns:
        the prefill (None where nothing is cut: the arguments are untouched), and its report.
    """
    embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
    cache: Any = kwargs.get("past_key_values")
    batch, length = embeds.shape[:2]
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise UnsupportedFeatureError(
            "A custom 4-D attention mask cannot be shortened with the visual tokens: pass the "
            "2-D padding mask of the processor, or unpatch the model."
        )
    real = torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
    if mask is not None:
        real = mask[:, -length:].to(embeds.device, torch.bool)
    images, samples = _place(encoded, visual)
    somewhere = torch.stack(list(visual.values())).any(0)
    last = _report(setup, images, (real & ~somewhere).sum(1)[:: batch // samples])
    state = pruned_state(cache)
    if state is None and not any(image.encoded.plan for image in images):
        return None, last

    keep = real.clone()
    for image in images:
        image.mark(keep, image.encoded.slots)
    first = Layout.of(keep)
    if cache is None and _wants_cache(kwargs, setup.config):
        cache = kwargs["past_key_values"] = DynamicCache(config=setup.config)
    if cache is not None:
        new = state is None
        state = make_pruned(cache, setup.ticket, setup.starts)
        if new and mask is not None and mask.shape[1] > length:
            for segment in state.segments:  # a text prefix, cached before the image came
                segment.padding = mask[:, :-length].to(embeds.device, torch.bool)
        stored = int(cache.physical_length())
        state.uncroppable = (
            stored + first.length - min(_trailing_text(real, somewhere), first.length)
        )
    ids = kwargs.get("position_ids")
    if ids is None:
        seen = cache.get_seq_length() if cache is not None else 0
        ids = torch.arange(length, device=embeds.device)[None] + seen
    ids = _sources(ids[..., -length:], images, setup.positions, batch)
    kwargs["position_ids"] = _positions(setup, ids, first, real, state)
    kwargs["inputs_embeds"] = first.shorten(embeds)
    prefill = Prefill(
        setup=setup,
        images=images,
        length=length,
        first=first,
        cache=cache,
        state=state,
        last=last,
        chosen=chosen,
    )
    kwargs["attention_mask"] = prefill.padding
    if prefill.padding is None and cache is None:
        # Without mask and cache, gaps in the positions would read as packed sequences.
        kwargs["attention_mask"] = first.valid
    return prefill, last


def _place(
    encoded: Mapping[Modality, Encoded], visual: Mapping[Modality, Tensor]
) -> tuple[list[PlacedImage], int]:
    """All images in the order of the prompts, and the number of samples."""
    placed, samples = [], 1
    for modality, of_call in encoded.items():
        images, samples = _place_one(modality, of_call, visual[modality])
        placed += images
    placed.sort(key=lambda image: (image.sample, int(image.columns[0])))
    return placed, samples


def _place_one(
    modality: Modality, encoded: Encoded, visual: Tensor
) -> tuple[list[PlacedImage], int]:
    """Find each image's columns, and the number of samples.

    Beams repeat a sample's rows, which share its images.
    """
    what = modality.name
    counts = visual.sum(1).tolist()
    tokens = sum(image.num_tokens for image in encoded.images)
    repeats, rest = divmod(sum(counts), tokens) if tokens else (1, sum(counts))
    repeats = max(1, repeats)
    if rest or len(counts) % repeats:
        raise UnsupportedFeatureError(
            f"The batch has {sum(counts)} {what} placeholders for {tokens} visual tokens: "
            f"input_ids and {what}s do not belong together."
        )
    columns = visual.nonzero()[:, 1].split(counts)
    placed: list[PlacedImage] = []
    todo = iter(encoded.images)
    for sample, row in enumerate(range(0, len(counts), repeats)):
        rows = torch.arange(row, row + repeats, device=visual.device)
        used = 0
        while used < counts[row]:
            image = next(todo).to(visual.device)
            cols = columns[row][used : used + image.num_tokens]
            alive = torch.arange(image.num_tokens, device=visual.device)
            placed.append(PlacedImage(image, sample, rows, cols, alive, encoded.stopwatch))
            used += image.num_tokens
        if used != counts[row]:
            raise UnsupportedFeatureError(
                f"Row {row} has {counts[row]} {what} placeholders, which is no whole number of "
                f"its {what}s' tokens: input_ids and {what}s do not belong together."
            )
    return placed, len(counts) // repeats


def _report(setup: Setup, images: list[PlacedImage], text: Tensor) -> Last:
    """What is known before the decoder runs; `text` (samples,) counts the text tokens."""
    read: dict[str, list[int]] = {}
    for call in setup.calls:
        for need in call.method.needs(setup.shape):
            if hasattr(need, "layer"):
                read.setdefault(f"{call.name}: {type(need).__name__}", []).append(need.layer)
    last = Last(
        tilings=[image.encoded.tiling for image in images],
        kept=[image.encoded.tokens_at(image.encoded.slots) for image in images],
        order=[image.encoded.selection.order for image in images],
        tokens_kept=[len(image.encoded.slots) for image in images],
        members=[image.encoded.selection.groups for image in images],
        image_sample=[image.sample for image in images],
        text_tokens=text.tolist(),
        plans=[image.encoded.plan for image in images],
        positions=setup.positions,
        num_layers=setup.shape.decoder.num_layers,
        layers_read=read,
        stopwatches=list({id(image.stopwatch): image.stopwatch for image in images}.values()),
    )
    before = [stage for image in images for stage in image.encoded.plan if stage.layer == 0]
    if before:
        last.stages.append(StageReport(before[0].call.name, 0, list(last.kept)))
    return last


def _report_alive(last: Last, images: list[PlacedImage]) -> None:
    """What is alive after the last cut, once the decoder has run."""
    last.kept = [image.tokens for image in images]
    last.tokens_kept = [len(image.alive) for image in images]
    last.members = [image.encoded.members_at(image.alive) for image in images]
    last.order = [
        None if image.encoded.selection.order is None else image.encoded.rows_at(image.alive)
        for image in images
    ]


def _sources(ids: Tensor, images: list[PlacedImage], positions: Positions, batch: int) -> Tensor:
    """Position ids where each row has that of its own token, not that of its slot.

    Re-packed positions follow the order of the rows, whatever tokens they were.
    """
    columns = _moved(images, batch, ids.shape[-1])
    if columns is None or positions == "repacked":
        return ids
    if ids.dim() == 2:
        return gather_columns(ids, columns)
    axes = [gather_columns(axis, columns) for axis in ids]
    if len(axes) == 4:  # row 0 only tells packed sequences
        axes[0] = ids[0]
    return torch.stack(axes)


def _moved(images: list[PlacedImage], batch: int, length: int) -> Tensor | None:
    """(B, L) the column whose token is in each column; None where every token is in its own."""
    moved = [image for image in images if image.encoded.selection.order is not None]
    if not moved:
        return None
    columns = torch.arange(length, device=moved[0].columns.device).repeat(batch, 1)
    for image in moved:
        slots = image.columns[image.encoded.slots]
        columns[image.rows[:, None], slots] = image.columns[image.encoded.sources]
    return columns


def _positions(
    setup: Setup, ids: Tensor, layout: Layout, real: Tensor, state: PrunedState | None
) -> Tensor:
    """Position ids of the kept columns: (B, K), or (3 | 4, B, K) for M-RoPE."""
    gone = (real & ~layout.keep).cumsum(1)
    if ids.dim() == 3:
        short = layout.shorten(ids, dim=2)
        if len(ids) == 4:  # row 0 only tells packed sequences: it must have no gaps
            short = torch.cat([layout.shorten(ids[0] - gone)[None], short[1:]])
        return short
    if setup.positions == "original":
        return layout.shorten(ids)
    if state is not None:
        if state.shift is not None:
            gone = gone + state.shift
        state.shift = gone[:, -1:]
    return layout.shorten(ids - gone)


def _trailing_text(real: Tensor, visual: Tensor) -> int:
    """Text tokens after the last visual one, in the row that has fewest of them."""
    with_image = visual.any(1)
    if not bool(with_image.any()):
        return real.shape[1]
    after = visual.flip(1).cumsum(1).flip(1) == 0
    return int((real & after).sum(1)[with_image].min())


def _wants_cache(kwargs: Mapping[str, Any], config: Any) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(config.use_cache if use_cache is None else use_cache)
