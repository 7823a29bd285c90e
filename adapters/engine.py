"""The machinery between a patched model and its methods: hooks, and what they do.

One forward runs through these places, in order:

    get_image_features   encode: read signals, count, choose before the LLM
    core (pre-hook)      a prefill with visual tokens begins: where are they in the batch?
    text model (pre)     `prefill`: shorten embeddings, positions and mask; two lengths of cache
    decoder layers (pre) `prefill`: cut inside the decoder; masks and rotary tables that fit
    text model (post)    hidden states back to the caller's length
    core (post)          forget everything about this call

Later calls on the shortened cache pass `continuation` in the text model and its layers.

State of a call lives in a `threading.local`, so threads that share a model do not meet.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate

from ..prune.budget import MethodCall
from ..prune.contract import (
    ClsAttention,
    LastRowAttention,
    Place,
    Positions,
    ReceivedAttention,
    Signal,
)
from ..prune.errors import UnsupportedFeatureError, UnsupportedModelError
from . import probes
from .cache import Ticket, pruned_state
from .continuation import continue_layer, continue_text, static_padding
from .encoding import Encoded, Recording, encode, encode_merged, image_signals
from .family import Family, Model
from .guards import check_generate
from .prefill import Chosen, Prefill, begin
from .report import Last, Stopwatch
from .setup import Setup

_MARK = "_vlmprune_encoded"
"""Attribute of the encoder's output that carries `Encoded` through generate()."""

_MASK_WITHOUT_EMBEDS = (
    "visual_mask= marks visual tokens inside inputs_embeds, and none were given: leave it out, "
    "input_ids and pixel_values tell by themselves."
)


class _Local(threading.local):
    """What belongs to the call in flight of one thread."""

    def __init__(self) -> None:
        self.recording: Recording | None = None
        self.visual: Tensor | None = None
        self.encoded: Encoded | None = None
        self.prefill: Prefill | None = None
        self.visual_mask: Tensor | None = None
        self.chosen: Chosen | None = None
        """Within generate(): without a cache every step prefills again, and must not choose anew
        with its newest token."""
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
        self.model, self.family = model, family
        self.core: Any = family.core(model)
        self.text: Any = family.text_model(model)
        shape = family.shape(model)
        cut_layers = {cut.layer for call in calls for cut in call.method.cuts(shape)}
        self.setup = Setup(
            calls=calls,
            shape=shape,
            positions=positions,
            config=self.text.config,
            starts=[0, *sorted(cut_layers - {0})],
            ticket=Ticket(),
        )
        self.last: Last | None = None
        self._local = _Local()
        self._warned = False
        self._undo: list[Callable[[], None]] = []
        self._needs: tuple[Signal, ...] = tuple(
            need
            for call in calls
            if call.method.place is Place.BEFORE_LLM
            for need in call.method.needs(shape)
        )
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
        flash = "flash" in (self.setup.config._attn_implementation or "")
        gapped = flash and self.setup.positions == "original"
        first = 0 if gapped else min([*self.setup.starts[1:], len(layers)])
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
        for call in self.setup.calls:
            for need in call.method.needs(self.setup.shape):
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
        self.setup.ticket.active = False
        while self._undo:
            self._undo.pop()()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedFeatureError(
            "A patched model cannot be copied or pickled, because its hooks belong to this one "
            "object: call vlmprune.unpatch(model) first. model.save_pretrained() works as it is."
        )

    # --- generate() --------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        decoder = any(call.method.place is Place.DECODER for call in self.setup.calls)
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
            queries = kwargs["inputs_embeds"].shape[1]
            kwargs["attention_mask"] = static_padding(state, cache, queries)
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
        encoded = encode(self.setup, grids, signals, device)
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
                if local.encoded is None or local.encoded.owner is not self.setup.ticket:
                    raise UnsupportedFeatureError(
                        "mm_encoder_outputs was not made by this patch, so that nothing is known "
                        "of its images: pass pixel_values, or encode again on the patched model."
                    )
        elif embeds is not None and explicit is not None:
            repeats = embeds.shape[0] // explicit.shape[0]
            local.visual = explicit.to(embeds.device, torch.bool).repeat_interleave(repeats, 0)
        elif embeds is not None and not _seen(kwargs.get("past_key_values")):
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
            positions=self.setup.positions,
            num_layers=self.setup.shape.decoder.num_layers,
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
        local = self._local
        if local.visual is None:
            state = pruned_state(kwargs.get("past_key_values"))
            if state is None:
                return None
            local.masks, kwargs = {}, dict(kwargs)
            continue_text(state, kwargs)
            return args, kwargs
        kwargs = dict(kwargs)
        visual = local.visual.to(kwargs["inputs_embeds"].device)
        encoded = local.encoded
        if encoded is None:
            encoded = encode_merged(self.setup, self._needs, kwargs["inputs_embeds"], visual)
        self._refuse_checkpointing(encoded)
        local.prefill, last = begin(self.setup, encoded, visual, kwargs, local.chosen)
        if local.prefill is None:
            self.last = last
        return args, kwargs

    def _refuse_checkpointing(self, encoded: Encoded) -> None:
        in_decoder = any(stage.layer for image in encoded.images for stage in image.plan)
        if in_decoder and self.text.training and self.text.gradient_checkpointing:
            raise UnsupportedFeatureError(
                "Pruning inside the decoder cannot be combined with gradient checkpointing, which "
                "runs layers a second time: call model.activation_checkpointing_disable() or "
                "model.eval(), or use a method that acts before the LLM."
            )

    @torch.compiler.disable
    def _hear_decoder(
        self, layer: int, query: Tensor, key: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> None:
        if self._local.prefill is not None:
            with torch.no_grad():
                self._local.prefill.hear(layer, query, key, mask, scaling)

    @torch.compiler.disable
    def _before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        hidden, *rest = args
        prefill = self._local.prefill
        if prefill is None:
            new = continue_layer(self.setup.config, layer, hidden, kwargs, self._local.masks)
            return None if new is None else (args, new)
        if self.setup.start_of(layer) == 0:  # flash attention with gapped positions
            return args, {**kwargs, "position_ids": None}
        hidden, kwargs = prefill.enter_layer(layer, hidden, kwargs)
        return (hidden, *rest), kwargs

    @torch.compiler.disable
    def _after_text(self, module: nn.Module, args: Any, output: Any) -> Any:
        prefill, self._local.prefill = self._local.prefill, None
        if prefill is None or output is None:
            return None
        if isinstance(output, tuple):
            output = (prefill.restore(output[0]), *output[1:])
        else:
            output.last_hidden_state = prefill.restore(output.last_hidden_state)
        self.last = prefill.last
        return output


def _seen(cache: Any) -> Any:
    """Tokens fed into a cache so far, 0 without one."""
    return cache.get_seq_length() if cache is not None else 0
