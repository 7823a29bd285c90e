"""The machinery between a patched model and its methods: hooks, and what they do.

One forward runs through these places, in order:

    get_image_features   encode: read signals, count, choose before the LLM
    core (pre-hook)      a prefill with visual tokens begins: where are they in the batch?
    text model (pre)     shorten embeddings, positions and mask; give the cache its two lengths
    decoder layers (pre) cut inside the decoder; masks and rotary tables for shorter layers
    text model (post)    hidden states back to the caller's length
    core (post)          forget everything about this call

State of a call lives in a `threading.local`, so threads that share a model do not meet.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.masking_utils import create_masks_for_generate

from ..prune.budget import MethodCall
from ..prune.contract import (
    ClsAttention,
    LastRowAttention,
    ModelShape,
    Place,
    Positions,
    ReceivedAttention,
    Signal,
    VisualTokens,
)
from ..prune.errors import UnsupportedFeatureError, UnsupportedModelError
from . import probes
from .cache import PrunedState, Ticket, make_pruned, pruned_state
from .encoding import (
    Encoded,
    EncodedImage,
    Recording,
    choose,
    encode,
    image_signals,
    merged_signals,
)
from .family import Family, Model
from .guards import check_generate
from .masks import layer_mask
from .report import Last, StageReport, Stopwatch
from .sequence import Layout, gather_columns

_MARK = "_vlmprune_encoded"
"""Attribute of the encoder's output that carries `Encoded` through generate()."""

_MASK_WITHOUT_EMBEDS = (
    "visual_mask= marks visual tokens inside inputs_embeds, and none were given: leave it out, "
    "input_ids and pixel_values tell by themselves."
)


@dataclass
class _Image:
    """An image placed in the batch. `rows` are its sample's rows (several under beam search)."""

    encoded: EncodedImage
    sample: int
    rows: Tensor
    columns: Tensor
    """Columns of its tokens in the caller's sequence, (N,)."""
    alive: Tensor
    """Original indices alive so far, ascending."""

    def mark(self, keep: Tensor, alive: Tensor) -> None:
        """Make exactly `alive` of this image's tokens survive in `keep` (B, L), in place."""
        rows = self.rows[:, None]
        keep[rows, self.columns[self.alive]] = False
        keep[rows, self.columns[alive]] = True
        self.alive = alive


@dataclass
class _Prefill:
    """A prefill with visual tokens on its way through the text model."""

    images: list[_Image]
    encoded: Encoded
    first: Layout
    """The batch as it enters layer 0."""
    layout: Layout
    """The batch as it enters the current layer."""
    cache: Cache | None
    state: PrunedState | None
    length: int
    """L of the caller's sequence."""
    last: Last
    past: dict[int, int] = field(default_factory=dict)
    """Columns stored before this prefill, per segment."""
    rows: dict[int, Tensor] = field(default_factory=dict)
    """Attention rows read so far, by decoder layer: (B, layout.length)."""
    padding: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    def cuts_at(self, layer: int) -> bool:
        return any(stage.layer == layer for image in self.images for stage in image.encoded.plan)


class _Local(threading.local):
    """What belongs to the call in flight of one thread."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.visual: Tensor | None = None
        self.encoded: Encoded | None = None
        self.prefill: _Prefill | None = None
        self.visual_mask: Tensor | None = None
        self.chosen: dict[tuple[int, int], Tensor] | None = None
        """Within generate(): what each cut (layer, image) left alive. Without a cache every step
        prefills again, and must not choose anew with its newest token."""
        self.masks: dict[Any, Any] = {}


class Engine:
    """Everything that `patch` installs on one model; `remove()` takes all of it away."""

    def __init__(
        self,
        model: Model,
        family: Family,
        calls: tuple[MethodCall, ...],
        positions: Positions,
    ) -> None:
        self.model, self.family, self.calls, self.positions = model, family, calls, positions
        self.shape: ModelShape = family.shape(model)
        self.core: Any = family.core(model)
        self.text: Any = family.text_model(model)
        self.config = self.text.config
        self.ticket = Ticket()
        self.last: Last | None = None
        self._local = _Local()
        self._warned = False
        self._undo: list[Callable[[], None]] = []
        self._needs: tuple[Signal, ...] = tuple(
            need
            for call in calls
            if call.method.place is Place.BEFORE_LLM
            for need in call.method.needs(self.shape)
        )
        cut_layers = {cut.layer for call in calls for cut in call.method.cuts(self.shape)}
        self.starts = [0, *sorted(cut_layers - {0})]
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    # --- installing and removing -------------------------------------------------------------

    def _install(self) -> None:
        self._override(self.core, "get_image_features", self._encode)
        self._override(self.model, "generate", self._generate)
        make_masks = getattr(self.model, "create_masks_for_generate", create_masks_for_generate)
        self._override(
            self.model, "create_masks_for_generate", self._create_masks, original=make_masks
        )
        if hasattr(self.model, "generate_batch"):
            self._override(self.model, "generate_batch", self._refuse_batch)
        hooks = [
            self.core.register_forward_pre_hook(self._before_core, with_kwargs=True),
            self.core.register_forward_hook(self._after_core, always_call=True),
            self.text.register_forward_pre_hook(self._before_text, with_kwargs=True),
            self.text.register_forward_hook(self._after_text, always_call=True),
        ]
        layers = self.text.layers
        # Flash attention reads gapped position ids as packed sequences: hook every layer there.
        gapped = self.positions == "original" and "flash" in (
            self.config._attn_implementation or ""
        )
        first = 0 if gapped else self.starts[1] if len(self.starts) > 1 else len(layers)
        for index in range(first, len(layers)):
            hook = functools.partial(self._before_layer, index)
            hooks.append(layers[index].register_forward_pre_hook(hook, with_kwargs=True))
        self._undo += [hook.remove for hook in hooks]

        encoder = self.family.vision_attention(self.model)
        listeners: dict[nn.Module, list[probes.Listener]] = {}
        for need in self._needs:
            if isinstance(need, ClsAttention | ReceivedAttention):
                listen = functools.partial(self._hear_encoder, need)
                listeners.setdefault(encoder[need.layer], []).append(listen)
        for call in self.calls:
            for need in call.method.needs(self.shape):
                if isinstance(need, LastRowAttention):
                    listen = functools.partial(self._hear_decoder, need.layer)
                    listeners.setdefault(layers[need.layer].self_attn, []).append(listen)
        for module, heard in listeners.items():
            self._undo.append(probes.Tap(module, heard).remove)

    def _override(
        self,
        owner: nn.Module,
        name: str,
        replacement: Callable[..., Any],
        original: Callable[..., Any] | None = None,
    ) -> None:
        """Shadow a method on the instance; the original is the first argument of `replacement`."""
        original = original or getattr(owner, name)
        shadowed = owner.__dict__.get(name)
        bound = functools.wraps(original)(functools.partial(replacement, original))
        owner.__dict__[name] = bound

        def undo() -> None:
            if shadowed is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = shadowed

        self._undo.append(undo)

    def remove(self) -> None:
        """Put the model back exactly as it was. A second call does nothing."""
        self.ticket.active = False
        while self._undo:
            self._undo.pop()()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedFeatureError(
            "A patched model cannot be copied or pickled, because its hooks belong to this one "
            "object: call vlmprune.unpatch(model) first. model.save_pretrained() works as it is."
        )

    # --- generate() --------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        decoder = any(call.method.place is Place.DECODER for call in self.calls)
        check_generate(self.model, kwargs, scores_last_token=decoder)
        if kwargs.get("visual_mask") is not None and kwargs.get("inputs_embeds") is None:
            raise UnsupportedFeatureError(_MASK_WITHOUT_EMBEDS)
        local = self._local
        local.visual_mask, local.chosen = kwargs.pop("visual_mask", None), {}
        try:
            return original(*args, **kwargs)
        finally:
            local.visual_mask, local.chosen = None, None

    def _refuse_batch(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        raise UnsupportedFeatureError(
            "generate_batch (continuous batching with a paged cache) does not work on a patched "
            "model: use generate(), or unpatch the model first."
        )

    def _create_masks(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Static caches: generate() builds 4-D masks above the model, from logical lengths."""
        if args:  # transformers passes keywords only
            return original(*args, **kwargs)
        if kwargs.get("is_first_iteration"):
            return kwargs["attention_mask"]  # the text model's hook needs the 2-D mask
        cache = kwargs["past_key_values"]
        state = pruned_state(cache)
        if state is not None:
            length = _mask_length(cache, kwargs["inputs_embeds"].shape[1], 0)
            kwargs["attention_mask"] = state.segments[0].padding_to(length)
        return original(**kwargs)

    # --- vision encoder ----------------------------------------------------------------------

    @torch.compiler.disable
    def _encode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = inspect.signature(original).bind(*args, **kwargs).arguments
        self._local.recording = recording = Recording()
        try:
            output = original(*args, **kwargs)
        finally:
            self._local.recording = None
        features = getattr(output, "pooler_output", None)
        if features is None:  # return_dict=False: a plain tuple cannot carry the choice
            return output
        grids = self.family.grids(self.model, features, inputs)
        for grid, feature in zip(grids, features, strict=True):
            if grid[0] * grid[1] != len(feature):
                raise UnsupportedModelError(
                    f"An image gave {len(feature)} visual tokens, but its grid is {grid[0]} x "
                    f"{grid[1]}: this variant of {self.family.name} is not supported."
                )
        with torch.no_grad():
            signals = image_signals(
                self.family, self.model, self._needs, features, inputs, recording
            )
        device = features[0].device
        encoded = encode(self.ticket, self.calls, self.shape, grids, signals, device)
        setattr(output, _MARK, encoded)
        self._local.encoded = encoded
        return output

    @torch.compiler.disable
    def _hear_encoder(
        self, need: Signal, query: Tensor, key: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> None:
        recording = self._local.recording
        if recording is None:
            return
        read = probes.cls_row if isinstance(need, ClsAttention) else probes.received
        bounds = kwargs.get("cu_seq_lens_q")
        if bounds is None:
            recording.add(need, read(query, key, scaling))
        else:  # flash attention: all images in one packed sequence
            sizes = bounds.diff().tolist()
            for q, k in zip(query.split(sizes, 2), key.split(sizes, 2), strict=True):
                recording.add(need, read(q, k, scaling))

    # --- multimodal core ---------------------------------------------------------------------

    @torch.compiler.disable
    def _before_core(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        local = self._local
        local.visual, local.encoded, local.prefill = None, None, None
        outputs: Mapping[str, Any] = kwargs.get("mm_encoder_outputs") or {}
        ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        if kwargs.get("pixel_values_videos") is not None or outputs.get("video") is not None:
            raise UnsupportedFeatureError(
                f"Video inputs of {self.family.name} are not supported yet: unpatch the model "
                f"(vlmprune.unpatch(model)) for videos."
            )
        explicit = kwargs.pop("visual_mask", None)
        if embeds is not None and explicit is None:
            explicit, local.visual_mask = local.visual_mask, None
        if embeds is None and explicit is not None:
            raise UnsupportedFeatureError(_MASK_WITHOUT_EMBEDS)
        if outputs.get("image") is not None or kwargs.get("pixel_values") is not None:
            token = self.model.config.image_token_id
            if embeds is None:
                local.visual = ids == token
            else:
                row = self.core.get_input_embeddings()(torch.tensor(token, device=embeds.device))
                local.visual = (embeds == row).all(-1)
            if outputs.get("image") is not None:
                local.encoded = getattr(outputs["image"], _MARK, None)
                if local.encoded is None or local.encoded.owner is not self.ticket:
                    raise UnsupportedFeatureError(
                        "mm_encoder_outputs was not made by this patch, so that nothing is known "
                        "of its images: pass pixel_values, or encode again on the patched model."
                    )
        elif embeds is not None and explicit is not None:
            repeats = embeds.shape[0] // explicit.shape[0]
            local.visual = explicit.to(embeds.device, torch.bool).repeat_interleave(repeats, 0)
        elif embeds is not None and not _length(kwargs.get("past_key_values")):
            self._not_pruned()
        return args, kwargs

    def _not_pruned(self) -> None:
        note = (
            "inputs_embeds came without pixel_values, so that visual tokens cannot be told from "
            "text: nothing was pruned. Pass visual_mask= (B, L) bool to mark them."
        )
        self.last = Last(
            grids=[],
            tokens_in=[],
            kept=[],
            image_sample=[],
            text_tokens=[],
            plans=[],
            positions=self.positions,
            num_layers=self.shape.decoder.num_layers,
            layers_read={},
            stopwatch=Stopwatch(torch.device("cpu")),
            note=note,
        )
        if not self._warned:
            self._warned = True
            warnings.warn(note, UserWarning, stacklevel=2)

    @torch.compiler.disable
    def _after_core(self, module: nn.Module, args: Any, output: Any) -> None:
        local = self._local
        local.visual, local.encoded, local.prefill = None, None, None

    # --- text model: prefill -----------------------------------------------------------------

    @torch.compiler.disable
    def _before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._local.visual is not None:
            return self._shorten(args, dict(kwargs))
        state = pruned_state(kwargs.get("past_key_values"))
        if state is not None:
            return self._continue(state, args, dict(kwargs))
        return None

    def _shorten(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        local = self._local
        embeds, mask, cache = (
            kwargs["inputs_embeds"],
            kwargs.get("attention_mask"),
            kwargs.get("past_key_values"),
        )
        batch, length = embeds.shape[:2]
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise UnsupportedFeatureError(
                "A custom 4-D attention mask cannot be shortened with the visual tokens: pass the "
                "2-D padding mask of the processor, or unpatch the model."
            )
        real = torch.ones(batch, length, dtype=torch.bool, device=embeds.device)
        if mask is not None:
            real = mask[:, -length:].to(embeds.device, torch.bool)
        assert local.visual is not None  # noqa: S101  (checked by the caller)
        visual = local.visual.to(embeds.device)
        encoded = local.encoded or self._encode_merged(embeds, visual)
        images, num_samples = self._place(encoded, visual)
        last = self._report(encoded, images, real, visual, num_samples)
        state = pruned_state(cache)
        if state is None and not any(image.encoded.plan for image in images):
            self.last = last
            return None
        in_decoder = any(stage.layer for image in images for stage in image.encoded.plan)
        if in_decoder and self.text.training and self.text.gradient_checkpointing:
            raise UnsupportedFeatureError(
                "Pruning inside the decoder cannot be combined with gradient checkpointing, which "
                "runs layers a second time: call model.activation_checkpointing_disable() or "
                "model.eval(), or use a method that acts before the LLM."
            )

        keep = real.clone()
        for image in images:
            image.mark(keep, image.encoded.kept.to(embeds.device))
        layout = Layout.of(keep)
        if cache is None and _wants_cache(kwargs, self.config):
            cache = kwargs["past_key_values"] = DynamicCache(config=self.config)
        past_padding = None
        if cache is not None:
            if state is None and mask is not None and mask.shape[1] > length:
                past_padding = mask[:, :-length].to(embeds.device, torch.bool)
            state = make_pruned(cache, self.ticket, self.starts)
            for segment in state.segments:
                segment.padding = past_padding if past_padding is not None else segment.padding
        prefill = _Prefill(
            images=images,
            encoded=encoded,
            first=layout,
            layout=layout,
            cache=cache,
            state=state,
            length=length,
            last=last,
        )
        if any(stage.layer == 0 for image in images for stage in image.encoded.plan):
            name = next(c.name for c in self.calls if c.method.place is Place.BEFORE_LLM)
            last.stages.append(StageReport(name, 0, [image.alive for image in images]))
        ids = kwargs.get("position_ids")
        if ids is None:
            ids = torch.arange(length, device=embeds.device)[None] + _length(cache)
        kwargs["position_ids"] = self._shorten_positions(ids[..., -length:], layout, real, state)
        kwargs["inputs_embeds"] = layout.shorten(embeds)
        if state is not None:
            after = real & ~visual & (visual.flip(1).cumsum(1).flip(1) == 0)
            trailing = int(after.sum(1)[visual.any(1)].min()) if bool(visual.any()) else length
            stored = int(cache.physical_length())  # type: ignore[union-attr]
            state.uncroppable = stored + layout.length - min(trailing, layout.length)
        self._enter_segment(prefill, 0)
        padding = prefill.padding
        if padding is None and cache is None:
            # Without mask and cache, gaps in the positions would read as packed sequences.
            padding = layout.valid
        kwargs["attention_mask"] = padding
        local.prefill = prefill
        return args, kwargs

    def _encode_merged(self, embeds: Tensor, visual: Tensor) -> Encoded:
        """Images that the caller merged into `inputs_embeds`: each run of visual tokens is one."""
        signals, grids = [], []
        for row, marks in zip(embeds.detach(), visual.tolist(), strict=True):
            start = None
            for column, mark in enumerate([*marks, False]):
                if mark and start is None:
                    start = column
                elif not mark and start is not None:
                    signals.append(merged_signals(self._needs, row[start:column]))
                    grids.append((1, column - start))
                    start = None
        return encode(self.ticket, self.calls, self.shape, grids, signals, embeds.device)

    def _place(self, encoded: Encoded, visual: Tensor) -> tuple[list[_Image], int]:
        """Find each image's columns; beams repeat a sample's rows and share its images."""
        counts = visual.sum(1).tolist()
        tokens = sum(image.num_tokens for image in encoded.images)
        repeats, rest = divmod(sum(counts), max(1, tokens))
        if rest or (tokens and len(counts) % max(1, repeats)):
            raise UnsupportedFeatureError(
                f"The batch has {sum(counts)} image placeholders for {tokens} visual tokens: "
                f"input_ids and images do not belong together."
            )
        repeats = max(1, repeats)
        columns = visual.nonzero()[:, 1].split(counts)
        placed: list[_Image] = []
        todo = iter(encoded.images)
        for sample in range(len(counts) // repeats):
            row = sample * repeats
            rows = torch.arange(row, row + repeats, device=visual.device)
            used = 0
            while used < counts[row]:
                image = next(todo)
                cols = columns[row][used : used + image.num_tokens]
                alive = torch.arange(image.num_tokens, device=visual.device)
                placed.append(_Image(image, sample, rows, cols, alive))
                used += image.num_tokens
            if used != counts[row]:
                raise UnsupportedFeatureError(
                    f"Row {row} has {counts[row]} image placeholders, which is no whole number of "
                    f"its images' tokens: input_ids and images do not belong together."
                )
        return placed, len(counts) // repeats

    def _report(
        self, encoded: Encoded, images: list[_Image], real: Tensor, visual: Tensor, samples: int
    ) -> Last:
        text = (real & ~visual).sum(1)[:: max(1, len(real) // max(1, samples))]
        read: dict[str, list[int]] = {}
        for call in self.calls:
            for need in call.method.needs(self.shape):
                if hasattr(need, "layer"):
                    read.setdefault(f"{call.name}: {type(need).__name__}", []).append(need.layer)
        return Last(
            grids=[image.encoded.grid for image in images],
            tokens_in=[image.encoded.num_tokens for image in images],
            kept=[image.encoded.kept for image in images],
            image_sample=[image.sample for image in images],
            text_tokens=text.tolist(),
            plans=[image.encoded.plan for image in images],
            positions=self.positions,
            num_layers=self.shape.decoder.num_layers,
            layers_read=read,
            stopwatch=encoded.stopwatch,
        )

    def _shorten_positions(
        self, ids: Tensor, layout: Layout, real: Tensor, state: PrunedState | None
    ) -> Tensor:
        """Position ids of the kept columns: (B, K), or (3 | 4, B, K) for M-RoPE."""
        gone = (real & ~layout.keep).cumsum(1)
        if ids.dim() == 3:
            short = layout.shorten(ids, dim=2)
            if len(ids) == 4:  # row 0 only tells packed sequences: it must have no gaps
                contiguous = layout.shorten(ids[0] - gone)
                short = torch.cat([contiguous[None], short[1:]])
            return short
        if self.positions == "original":
            return layout.shorten(ids)
        before = state.shift if state is not None else None
        shift = gone if before is None else gone + before
        if state is not None:
            state.shift = shift[:, -1:]
        return layout.shorten(ids - shift)

    def _enter_segment(self, prefill: _Prefill, start: int) -> None:
        """The layers from `start` on store `prefill.layout`: record it in the cache's state."""
        padding, layout, state = prefill.layout.padding, prefill.layout, prefill.state
        prefill.past[start] = 0
        if state is not None:
            segment = state.segment(start)
            past = int(prefill.cache.physical_length(start))  # type: ignore[union-attr]
            prefill.past[start] = past
            if padding is not None or segment.padding is not None:
                before = segment.padding_to(past)
                if before is None:
                    before = layout.valid.new_ones(layout.valid.shape[0], past)
                padding = torch.cat([before, layout.valid], dim=1)
            segment.padding = padding
            segment.dropped += prefill.length - layout.length
        prefill.padding = padding

    # --- text model: later calls on a pruned cache --------------------------------------------

    def _continue(
        self, state: PrunedState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Decoding and further text: the caller counts logically, the cache stores less."""
        self._local.masks = {}
        cache, mask, ids = (
            kwargs["past_key_values"],
            kwargs.get("attention_mask"),
            kwargs.get("position_ids"),
        )
        length = kwargs["inputs_embeds"].shape[1]
        if ids is not None:
            ids = ids[..., -length:]
        if state.shift is not None:
            if ids is None:
                device = kwargs["inputs_embeds"].device
                ids = torch.arange(length, device=device)[None] + cache.get_seq_length()
            ids = ids - state.shift
        kwargs["position_ids"] = ids
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            return args, kwargs  # a static cache: built by `_create_masks`
        # A single new token is always real; more of them may be padded.
        if mask is not None and length > 1 and not bool(mask[:, -length:].all()):
            for segment in state.segments:
                stored = int(cache.physical_length(segment.start))
                before = segment.padding_to(stored)
                new = mask[:, -length:].to(kwargs["inputs_embeds"].device, torch.bool)
                if before is None:
                    before = new.new_ones(len(new), stored)
                segment.padding = torch.cat([before, new], dim=1)
        total = _mask_length(cache, length, 0)
        kwargs["attention_mask"] = state.segments[0].padding_to(total)
        return args, kwargs

    # --- decoder layers ----------------------------------------------------------------------

    @torch.compiler.disable
    def _hear_decoder(
        self, layer: int, query: Tensor, key: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> None:
        prefill = self._local.prefill
        if prefill is None or not prefill.cuts_at(layer + 1):
            return
        segment = max(start for start in prefill.past if start <= layer)
        past = prefill.past[segment]
        with torch.no_grad():
            row = probes.last_row(query, key, mask, scaling, past + prefill.layout.length)
        prefill.rows[layer] = row[:, past:]

    @torch.compiler.disable
    def _before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prefill = self._local.prefill
        if prefill is None:
            return self._continue_layer(layer, args, kwargs)
        start = max(s for s in self.starts if s <= layer)
        if start == 0:  # flash attention with gapped positions
            return args, {**kwargs, "position_ids": None}
        hidden = args[0]
        if layer == start:
            before = prefill.layout
            if prefill.cuts_at(layer):
                prefill.layout = self._cut(prefill, layer)
                hidden = gather_columns(hidden, before.then(prefill.layout))
            self._enter_segment(prefill, start)
        cos, sin = kwargs["position_embeddings"]
        rotary = ("rotary", start, id(cos))
        if rotary not in prefill.memo:
            columns = prefill.first.then(prefill.layout)
            prefill.memo[rotary] = (gather_columns(cos, columns), gather_columns(sin, columns))
        kinds = getattr(self.config, "layer_types", None)
        mask = ("mask", start, kinds[layer] if kinds else None)
        if mask not in prefill.memo:
            prefill.memo[mask] = layer_mask(
                self.config, layer, hidden, prefill.padding, prefill.cache
            )
        kwargs = {
            **kwargs,
            "position_embeddings": prefill.memo[rotary],
            "attention_mask": prefill.memo[mask],
            "position_ids": None,
        }
        return (hidden, *args[1:]), kwargs

    def _continue_layer(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Decoding: a mask made for layer 0 has the wrong length for layers that store less."""
        if kwargs.get("attention_mask") is None:
            return None
        cache = kwargs.get("past_key_values")
        state = pruned_state(cache)
        if state is None or state.segment(layer).start == 0:
            return None
        segment = state.segment(layer)
        kinds = getattr(self.config, "layer_types", None)
        key = (segment.start, kinds[layer] if kinds else None)
        masks = self._local.masks
        if key not in masks:
            total = _mask_length(cache, args[0].shape[1], layer)
            padding = segment.padding_to(total)
            masks[key] = layer_mask(self.config, layer, args[0], padding, cache)
        return args, {**kwargs, "attention_mask": masks[key]}

    def _cut(self, prefill: _Prefill, layer: int) -> Layout:
        """Let the method of this layer choose, image by image; returns the shorter layout."""
        keep = prefill.layout.keep.clone()
        name = ""
        chosen = self._local.chosen
        for number, image in enumerate(prefill.images):
            stage = next((s for s in image.encoded.plan if s.layer == layer), None)
            if stage is None:
                continue
            name = stage.call.name
            if chosen is not None and (layer, number) in chosen:
                image.mark(keep, chosen[layer, number])
                continue
            row = image.rows[0]
            place = prefill.layout.place[row, image.columns[image.alive]]
            signals: dict[Signal, Tensor] = {
                need: prefill.rows[need.layer][row, place]
                for need in stage.call.method.needs(self.shape)
                if isinstance(need, LastRowAttention) and need.layer in prefill.rows
            }
            tokens = VisualTokens(
                num_tokens=len(image.alive),
                grid=image.encoded.grid,
                shape=self.shape,
                signals=signals,
                alive=image.alive,
            )
            kept = choose(stage, tokens, prefill.encoded.stopwatch)
            image.mark(keep, image.alive[kept])
            if chosen is not None:
                chosen[layer, number] = image.alive
        prefill.last.stages.append(StageReport(name, layer, [i.alive for i in prefill.images]))
        return Layout.of(keep)

    # --- text model: the way back ------------------------------------------------------------

    @torch.compiler.disable
    def _after_text(self, module: nn.Module, args: Any, output: Any) -> Any:
        prefill, self._local.prefill = self._local.prefill, None
        if prefill is None or output is None:
            return None
        prefill.last.kept = [image.alive for image in prefill.images]
        self.last = prefill.last
        if isinstance(output, tuple):
            return (prefill.layout.restore(output[0]), *output[1:])
        output.last_hidden_state = prefill.layout.restore(output.last_hidden_state)
        return output


def _length(cache: Cache | None) -> Any:
    """Logical length of a cache, 0 without one."""
    return cache.get_seq_length() if cache is not None else 0


def _mask_length(cache: Any, queries: int, layer: int) -> int:
    """Columns that a mask over stored and new tokens has in `layer`."""
    length, offset = cache.get_mask_sizes(queries, layer)
    return int(length + offset)


def _wants_cache(kwargs: Mapping[str, Any], config: Any) -> bool:
    use_cache = kwargs.get("use_cache")
    return bool(config.use_cache if use_cache is None else use_cache)
