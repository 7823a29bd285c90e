"""A prefill with visual tokens on its way through the text model, which it enters shortened.

`begin` shortens the text model's inputs; then the layers ask `Prefill` for theirs, cut by cut, and
show it what the methods declared; `Prefill.finish` brings the hidden states back to the caller's
length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ...prune.budget import Stage, remark
from ...prune.choose import ChosenImage, choose
from ...prune.contract import Cut, LayerSignal, Place, Selection, TextAttention, VisualTokens
from ...prune.errors import MethodAnswerError, UnsupportedFeatureError
from ...prune.tiling import Tiling
from ..cache.pruned import PrunedState, make_pruned, pruned_state
from ..family import Modality
from ..patch_setup import Setup
from ..report import Last, StageReport
from ..sequence.layout import Layout, gather_columns
from ..sequence.masks import layer_kind, layer_mask, tells_length
from ..sequence.placed import PlacedImage
from ..signals.decoder import (
    Here,
    Prompts,
    Rotary,
    hear_ahead,
    hear_attention,
    hear_input,
    hear_neurons,
    hear_positions,
    hear_step,
)
from .before_llm import Encoded
from .cache_attend import note_prefix
from .cache_evict import Compression, attend_budget, entries_to_keep, refuse_cache
from .placing import place

Chosen = dict[tuple[int, int], Selection]
"""What each cut (layer, number of the image) chose, within one generate()."""


@dataclass
class Prefill:
    """The state of one prefill. `cache` and `state` are None where nothing is cached."""

    setup: Setup
    prompts: Prompts
    length: int
    """L of the caller's sequence."""
    first: Layout
    """The batch as it enters layer 0."""
    ids: Tensor
    """(B | 1, L) or (axes, B, L): the caller's position ids."""
    gone: Tensor | None
    """(B, L): how many positions were closed up before each column; None: none."""
    cache: Any
    state: PrunedState | None
    last: Last
    chosen: Chosen | None
    compression: Compression | None

    layout: Layout = field(init=False)
    """The batch as it enters the current layer."""
    padding: Tensor | None = field(init=False)
    """Which stored and new columns of the current segment are tokens; None: all of them."""
    positions: Tensor = field(init=False)
    """Like `ids`: the position that the token of each column has in the current layer, but for what
    earlier turns closed up."""
    _source: Tensor | None = None
    """(B, L): the caller's column whose token is in each column; None: its own."""
    _past: dict[int, int] = field(default_factory=dict)
    """Columns stored before this prefill, per segment."""
    _projected: dict[int, Tensor] = field(default_factory=dict)
    """Key projections of a layer's input, made while choosing, that the layer need not repeat."""
    _layouts: dict[int, Layout] = field(default_factory=dict)
    """The batch as it enters each segment."""
    _memo: dict[Any, Any] = field(default_factory=dict)
    _replayed: bool = field(init=False)
    """Whether all choices were made in an earlier step of the same generate()."""

    def __post_init__(self) -> None:
        self.layout, self._replayed = self.first, bool(self.chosen)
        self._source = _moved(self.images, *self.prompts.real.shape)
        if self.gone is not None:  # re-packed positions follow the rows, whatever tokens they are
            self.positions = self.ids - self.gone
        elif self._source is not None:
            self.positions = _gathered(self.ids, self._source)
        else:
            self.positions = self.ids
        self._enter_segment(0)

    @property
    def images(self) -> list[PlacedImage]:
        return self.prompts.images

    # --- what methods declared ---------------------------------------------------------------

    def _wanted(self, layer: int, cutting: bool = False) -> list[LayerSignal]:
        """Signals of a layer that a later cut may ask for; or one of this layer, to be made now."""
        first = layer if cutting else layer + 1
        depth = Cut(Place.DECODER, first).depth
        if self._replayed or not any(
            stage.cut.depth >= depth for image in self.images for stage in image.plan
        ):
            return []
        return [need for need in self.setup.heard if need.layer == layer]

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Timed, and in float32 whatever autocast the caller is in."""
        stopwatch = self.images[0].stopwatch
        with stopwatch, torch.autocast(stopwatch.device.type, enabled=False):
            yield

    def _here(self, layer: int) -> Here:
        past = self._past[self.setup.start_of(layer)]
        return Here(self.layout, past, self.padding, self._window(layer))

    def _window(self, layer: int) -> int | None:
        sliding = layer_kind(self.setup.config, layer) == "sliding_attention"
        return self.setup.config.sliding_window if sliding else None

    def hear_attention(self, layer: int, query: Tensor, key: Tensor, scaling: float) -> None:
        """Queries and keys of a layer, as its attention uses them."""
        if self.compression is not None:
            self.compression.hear(layer, query, key, scaling)
        if needs := self._wanted(layer):
            with self._listening():
                hear_attention(needs, self.prompts, self._here(layer), query, key, scaling)

    def hear_step(self, layer: int, module: str, before: Tensor, after: Tensor) -> None:
        """Input and output of a layer's attention or MLP."""
        if needs := self._wanted(layer):
            with self._listening():
                hear_step(needs, module, self.prompts, self._here(layer), before, after)

    def hear_neurons(self, layer: int, activations: Tensor) -> None:
        """The input of the last projection of a layer's MLP."""
        if needs := self._wanted(layer):
            with self._listening():
                hear_neurons(needs, self.prompts, self._here(layer), activations)

    def keys_of(self, layer: int, given: Tensor) -> Tensor | None:
        """The key projection of `given` (B, length, D), if it was made already."""
        keys = self._projected.pop(layer, None)
        return keys if keys is not None and keys.shape[:2] == given.shape[:2] else None

    # --- layers ------------------------------------------------------------------------------

    def enter_layer(
        self, layer: int, module: Any, hidden: Tensor, kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        """The inputs of a decoder layer: shortened, if it is to be cut.

        The model goes on passing rotary tables, mask and positions for its first layer.
        """
        setup, start = self.setup, self.setup.start_of(layer)
        cut = bool(self._stages(layer))
        if layer == start and layer:
            if cut:
                hidden = self._cut(layer, module, hidden, kwargs["position_embeddings"])
            self._enter_segment(start)
        if start:
            mask = ("mask", start, layer_kind(setup.config, layer), hidden.device)
            if mask not in self._memo:
                self._memo[mask] = layer_mask(setup.config, layer, hidden, self.padding, self.cache)
            kwargs = {
                **kwargs,
                "position_embeddings": self._rotary(start, hidden, kwargs["position_embeddings"]),
                "attention_mask": self._memo[mask],
                "position_ids": None,
            }
        if needs := self._wanted(layer):
            with self._listening():
                rotary, here = kwargs["position_embeddings"], self._here(layer)
                if not cut:  # else `_cut` has shown it
                    hear_input(needs, self.prompts, here, hidden)
                hear_positions(needs, self.prompts, here, rotary)
        return hidden, dict(kwargs)

    def _rotary(self, start: int, hidden: Tensor, given: Rotary) -> Rotary:
        """Tables for the segment, (B, length, D_head) each; `given` are those of the first."""
        if not start:
            return given
        key = ("rotary", start, hidden.device)
        if key not in self._memo:
            ids = self.positions
            if self.state is not None and (shift := self.state.segment(start).shift) is not None:
                added = 0 if self.gone is None else self.gone[:, -1:]
                ids = ids - (shift - added)
            self._memo[key] = self.setup.rotary(hidden, self.layout.shorten(ids, ids.dim() - 1))
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
        if self._source is not None:
            number = number.gather(1, self._source.to(number.device))
        here = self.layout.shorten(visual) & self.layout.valid.to(visual.device)
        return here, self.layout.shorten(number)[here]

    def after_attention(self, layer: int, module: Any, kwargs: Mapping[str, Any]) -> None:
        """A layer has stored its keys and values."""
        if self.compression is not None:
            visual = self.prompts.real & ~self.prompts.text
            here = self._here(layer)
            with self.images[0].stopwatch:
                self.compression.after_attention(layer, module, kwargs, here, visual)

    def finish(self, hidden: Tensor) -> Tensor:
        """Final hidden states at the caller's length, (B, L, D); the report is complete."""
        if self.compression is not None and self.state is not None:
            self.compression.finish(self.state, self.last, self._layouts, self._span())
        last, images = self.last, self.images
        last.kept = [image.tokens for image in images]
        last.order = [image.order for image in images]
        last.tokens_kept = [len(image.slots) for image in images]
        last.members = [image.members for image in images]
        last.plans = [image.plan for image in images]
        return self.layout.restore(hidden)

    def _span(self) -> tuple[Tensor, Tensor] | None:
        """(B, 1) each, the caller's positions of the first token and of the next one; None for
        M-RoPE."""
        if self.ids.dim() > 2:
            return None
        real = self.prompts.real
        ids = self.ids.expand_as(real)
        first = ids.masked_fill(~real, torch.iinfo(ids.dtype).max).amin(1, keepdim=True)
        return first, ids.masked_fill(~real, -1).amax(1, keepdim=True) + 1

    def _enter_segment(self, start: int) -> None:
        """The layers from `start` on store `self.layout`: record it in the cache's state."""
        self.padding, self._past[start] = self.layout.padding, 0
        self._layouts[start] = self.layout
        if self.compression is not None:
            self.compression.places[start] = [i.entries(self.layout.keep) for i in self.images]
        if self.state is None:
            return
        segment = self.state.segment(start)
        past = self._past[start] = int(self.cache.physical_length(start))
        padded = self.padding is not None or segment.padding is not None
        if padded or tells_length(self.setup.config, self.cache):
            self.padding = segment.extended(past, self.layout.valid)
        segment.padding = self.padding
        segment.dropped += self.length - self.layout.length
        if self.gone is not None:
            before = 0 if segment.shift is None else segment.shift
            segment.shift = self.gone[:, -1:] + before

    # --- a cut -------------------------------------------------------------------------------

    def _cut(self, layer: int, module: Any, hidden: Tensor, rotary: Rotary) -> Tensor:
        """Let the method of this layer choose, image by image; returns the shorter input."""
        projected = self._hear_before(layer, module, hidden, rotary)
        repacks = self.setup.positions[Place.DECODER] == "repacked"
        moves: list[tuple[PlacedImage, Selection, tuple[Tensor, Tensor]]] = []
        orders: list[Tensor | None] = [None] * len(self.images)
        groups: list[Tensor | None] = [None] * len(self.images)
        scores: list[Tensor | None] = [None] * len(self.images)
        name = ""
        for numbers, stage in self._groups(layer):
            name = stage.call.name
            for number, chosen in self._choices(layer, numbers, stage):
                image = self.images[number]
                scores[number] = image.scored(chosen.scores)
                moved = image.apply(chosen)
                for stage in image.stages(layer):
                    image.done(stage)
                plain = chosen.order is None and image.order is None
                orders[number] = None if plain else chosen.arranged
                groups[number] = chosen.groups
                if moved is not None:
                    moves.append((image, chosen, moved))
        hidden = self._move(hidden, moves)
        keep = self.layout.keep.clone()
        for image in self.images:
            image.mark(keep)
        before, self.layout = self.layout, Layout.of(keep)
        columns = before.then(self.layout)
        if projected is not None and not moves:
            self._projected[layer] = gather_columns(projected, columns)
        if repacks:
            self.gone = (self.prompts.real & ~self.layout.keep).cumsum(1)
            self.positions = self.ids - self.gone
        self.last.stages.append(
            StageReport(
                method=name,
                place=Place.DECODER,
                layer=layer,
                kept=[image.tokens for image in self.images],
                positions="repacked" if repacks else "original",
                order=orders,
                groups=groups,
                scores=scores if self.setup.record else None,
                rows=[image.order for image in self.images],
                members=[image.members for image in self.images],
            )
        )
        return gather_columns(hidden, columns)

    def _hear_before(
        self, layer: int, module: Any, hidden: Tensor, rotary: Rotary
    ) -> Tensor | None:
        """Read what is declared of the uncut input; the layer's key projection, if it was made."""
        if not (needs := self._wanted(layer, cutting=True)):
            return None
        before = max(start for start in self.setup.starts if start < layer)
        cos, sin = self._rotary(before, hidden, rotary)
        rotary = cos.to(hidden.device), sin.to(hidden.device)
        here = self._here(layer - 1)
        with self._listening():
            hear_input(needs, self.prompts, here, hidden)
        if not any(isinstance(need, TextAttention) and need.ahead for need in needs):
            return None
        with self.images[0].stopwatch:
            stored, here = self._stored(layer)
            return hear_ahead(needs, self.prompts, here, module, hidden, rotary, stored)

    def _stored(self, layer: int) -> tuple[Tensor | None, Here]:
        """The keys that a layer stored before this prefill, and the batch as it is before a cut."""
        past = int(self.cache.physical_length(layer)) if self.state is not None else 0
        window = self._window(layer)
        if self.state is None or not past:
            return None, Here(self.layout, 0, self.layout.padding, window)
        valid = self.state.segment(layer).extended(past, self.layout.valid)
        keys: Tensor = self.cache.layers[layer].keys[:, :, :past]
        return keys, Here(self.layout, past, valid, window).holding(keys.shape[2])

    def _stages(self, layer: int) -> list[Stage]:
        """Cuts of a layer."""
        return [stage for image in self.images for stage in image.stages(layer)]

    def _groups(self, layer: int) -> list[tuple[list[int], Stage]]:
        """Images that are chosen from together at this layer: one, or those before the last."""
        groups: dict[tuple[int, int], tuple[list[int], Stage]] = {}
        for number, image in enumerate(self.images):
            for stage in image.stages(layer):
                pooled = stage.images == "context"
                key = (image.sample, -1 if pooled else number)
                groups.setdefault(key, ([], stage))[0].append(number)
        return list(groups.values())

    def _choices(self, layer: int, numbers: list[int], stage: Stage) -> list[tuple[int, Selection]]:
        """What is kept of each of some images."""
        done = self.chosen or {}
        if (layer, numbers[0]) in done:
            return [(number, done[layer, number]) for number in numbers]
        images = [self.images[number] for number in numbers]
        sizes = [len(image.slots) for image in images]
        if not sum(sizes):
            nothing = images[0].slots
            found = [(number, Selection(kept=nothing)) for number in numbers]
        else:
            planned = sum(one.keep for image in images for one in image.stages(layer))
            keep = min(planned, sum(sizes))  # an earlier cut may have left fewer than planned
            signals = {
                need: torch.cat([image.signals[need] for image in images])
                if need.per == "token"
                else images[0].signals[need]
                for need in images[0].signals
            }
            tokens = VisualTokens(
                num_tokens=sum(sizes),
                tiling=_joined([image.encoded.tiling for image in images]),
                shape=self.setup.shape,
                signals=signals,
                alive=torch.cat([image.row_tokens for image in images]),
                place=Place.DECODER,
                layer=layer,
            )
            stages, device = [replace(stage, keep=keep)], images[0].slots.device
            record, debug = self.setup.record, self.setup.debug
            with images[0].stopwatch:
                (chosen,) = choose(stages, [tokens], device, record=record, debug=debug)
            parts = [chosen] if len(images) == 1 else _split(stage, chosen, sizes)
            found = list(zip(numbers, parts, strict=True))
        if self.chosen is not None:
            self.chosen.update({(layer, number): part for number, part in found})
        return found

    def _move(
        self,
        hidden: Tensor,
        moves: list[tuple[PlacedImage, Selection, tuple[Tensor, Tensor]]],
    ) -> Tensor:
        """Put merged and moved rows into their slots, and note whose tokens they are."""
        if not moves:
            return hidden
        moved, (batch, length) = hidden.clone(), self.prompts.real.shape
        source = torch.arange(length, device=self.prompts.real.device).repeat(batch, 1)
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
        self._source = source if self._source is None else self._source.gather(1, source)
        self.positions = _gathered(self.positions, source)
        return moved


def begin(
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
    state = pruned_state(cache)
    setup = _setup(encoded.values(), state)
    batch, length = embeds.shape[:2]
    if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
        raise UnsupportedFeatureError(
            "A custom 4-D attention mask cannot be shortened with the visual tokens: pass the "
            "2-D padding mask of the processor, or unpatch the model."
        )
    real = torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
    if mask is not None:
        real = mask[:, -length:].to(embeds.device, torch.bool)
    images, samples = place(setup, encoded, visual)
    somewhere = torch.stack(list(visual.values())).any(0)
    text = real & ~somewhere
    last = _report(setup, images, text.sum(1)[:: batch // samples])
    keeps = entries_to_keep(setup, images, last.text_tokens)
    if state is None and keeps is None and not any(image.plan for image in images):
        return None, last

    keep = real.clone()
    for image in images:
        image.mark(keep)
    first = Layout.of(keep)
    if cache is None and _wants_cache(kwargs, setup.config):
        cache = kwargs["past_key_values"] = DynamicCache(config=setup.config)
    if keeps is not None:
        refuse_cache(setup, cache, shortened=state is not None)
    elif state is not None and state.setup.on_cache not in (None, setup.on_cache):
        refuse_cache(state.setup, cache, shortened=True)
    if cache is not None:
        new = state is None
        state = make_pruned(cache, setup)
        if new and mask is not None and mask.shape[1] > length:
            for segment in state.segments:  # a text prefix, cached before the image came
                segment.padding = mask[:, :-length].to(embeds.device, torch.bool)
        stored = int(cache.physical_length())
        state.uncroppable = (
            stored + first.length - min(_trailing_text(real, somewhere), first.length)
        )
        attend_budget(state, keeps, batch // samples, stored)
    ids = kwargs.get("position_ids")
    if ids is None:
        seen = cache.get_seq_length() if cache is not None else 0
        ids = torch.arange(length, device=embeds.device)[None] + seen
    ids = ids[..., -length:].to(embeds.device)
    if keeps is not None and state is not None:
        note_prefix(setup, state, cache, ids, real)
    repacks = setup.positions.get(Place.BEFORE_LLM) == "repacked"
    before = [s for image in images for s in image.plan if s.place is Place.BEFORE_LLM]
    gone = (real & ~first.keep).cumsum(1) if repacks and before else None
    earlier = None if state is None else state.segments[0].shift
    prefill = Prefill(
        setup=setup,
        prompts=Prompts(images, real, text, embeds),
        length=length,
        first=first,
        ids=ids,
        gone=gone,
        cache=cache,
        state=state,
        last=last,
        chosen=chosen,
        compression=Compression.of(setup, cache, keeps, samples, batch // samples),
    )
    kwargs["position_ids"] = _positions(prefill, ids, earlier)
    kwargs["inputs_embeds"] = first.shorten(embeds)
    kwargs["attention_mask"] = prefill.padding
    if prefill.padding is None and cache is None:
        # Without mask and cache, gaps in the positions would read as packed sequences.
        kwargs["attention_mask"] = first.valid
    return prefill, last


def _setup(encoded: Iterable[Encoded], state: PrunedState | None) -> Setup:
    """What images were encoded with is what they enter the LLM with; an earlier image in the cache
    keeps its segments."""
    encoded = list(encoded)
    setup = encoded[0].setup
    if any(other.setup.calls != setup.calls for other in encoded):
        raise UnsupportedFeatureError(
            "The images and the videos of this call were encoded with different budgets or "
            "methods: encode them together."
        )
    setup.check_images(sum(len(one.images) for one in encoded))
    return setup if state is None else setup.on_cache_of(state.setup)


def _report(setup: Setup, images: list[PlacedImage], text: Tensor) -> Last:
    """What is known before the decoder runs; `text` (samples,) counts the text tokens."""
    read: dict[str, list[int]] = {}
    for call in setup.calls:
        for need in call.method.needs(setup.shape):
            if hasattr(need, "layer"):
                read.setdefault(f"{call.name}: {type(need).__name__}", []).append(need.layer)
    last = Last(
        tilings=[image.encoded.tiling for image in images],
        kept=[image.tokens for image in images],
        order=[image.order for image in images],
        tokens_kept=[len(image.slots) for image in images],
        members=[image.members for image in images],
        image_sample=[image.sample for image in images],
        text_tokens=text.tolist(),
        plans=[image.plan for image in images],
        positions=setup.reported_positions,
        num_layers=setup.shape.decoder.num_layers,
        layers_read=read,
        recorded=setup.record,
        unranked={call.name: call.method.unranked for call in setup.calls},
        stopwatches=list({id(image.stopwatch): image.stopwatch for image in images}.values()),
        note=_remarks([image.encoded for image in images]),
    )
    before = [s for image in images for s in image.plan if s.place is Place.BEFORE_LLM]
    if before:
        mode = setup.positions[Place.BEFORE_LLM]
        report = StageReport(
            before[0].call.name,
            Place.BEFORE_LLM,
            before[0].layer,
            last.kept,
            mode,
            order=last.order,
            groups=last.members,
            rows=last.order,
            members=last.members,
        )
        if setup.record:
            report = replace(report, scores=[image.encoded.selection.scores for image in images])
        last.stages.append(report)
    return last


def _remarks(images: Sequence[ChosenImage]) -> str | None:
    """What the report says of the budgets, each thing once."""
    said = (remark(call, image.num_tokens) for image in images for call in image.calls)
    return " ".join(dict.fromkeys(filter(None, said))) or None


def _joined(tilings: list[Tiling]) -> Tiling:
    """Several images as one after the other."""
    return tilings[0] if len(tilings) == 1 else Tiling(sum((t.blocks for t in tilings), ()))


def _split(stage: Stage, chosen: Selection, sizes: list[int]) -> list[Selection]:
    """A choice from several images, image by image."""
    if chosen.order is not None or chosen.features is not None:
        raise MethodAnswerError(
            f"{stage.call.name} merged or moved rows at a cut that pools images, where tokens can "
            f"only be kept or dropped."
        )
    parts, start = [], 0
    for size in sizes:
        inside = (chosen.kept >= start) & (chosen.kept < start + size)
        scores = None if chosen.scores is None else chosen.scores[start : start + size]
        parts.append(Selection(kept=chosen.kept[inside] - start, scores=scores))
        start += size
    return parts


def _moved(images: list[PlacedImage], batch: int, length: int) -> Tensor | None:
    """(B, L) the column whose token is in each column; None where every token is in its own."""
    moved = [image for image in images if image.order is not None]
    if not moved:
        return None
    columns = torch.arange(length, device=moved[0].columns.device).repeat(batch, 1)
    for image in moved:
        slots = image.columns[image.slots]
        columns[image.rows[:, None], slots] = image.columns[image.encoded.sources]
    return columns


def _gathered(ids: Tensor, columns: Tensor) -> Tensor:
    """Position ids of the tokens in `columns` (B, L)."""
    if ids.dim() == 2:
        return gather_columns(ids, columns)
    return torch.stack([gather_columns(axis, columns) for axis in ids])


def _positions(prefill: Prefill, ids: Tensor, shift: Tensor | None) -> Tensor:
    """Position ids of the columns that enter the first layer: (B, K), or (3 | 4, B, K) for M-RoPE.

    Args:
        shift: (B, 1), what earlier turns closed up.
    """
    positions, first = prefill.positions, prefill.first
    if shift is not None:
        positions = positions - shift
    short = first.shorten(positions, dim=positions.dim() - 1)
    if len(short) == 4 and short.dim() == 3:
        # Row 0 only tells packed sequences: it must have no gaps.
        gone = (prefill.prompts.real & ~first.keep).cumsum(1)
        short = torch.cat([first.shorten(ids[0] - gone)[None], short[1:]])
    return short


def _trailing_text(real: Tensor, visual: Tensor) -> int:
    """Text tokens after the last visual one, in the row that has fewest of them."""
    after = visual.flip(1).cumsum(1).flip(1) == 0
    counts = (real & after).sum(1).masked_fill(~visual.any(1), real.shape[1])
    return int(counts.min())  # the host waits here


def _wants_cache(kwargs: Mapping[str, Any], config: Any) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(config.use_cache if use_cache is None else use_cache)
