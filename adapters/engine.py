"""The machinery between a patched model and its methods: hooks, and what they do.

One forward runs through these places, in order:

    get_image_features   encode: read signals, count, choose before the LLM
    core (pre-hook)      a prefill with visual tokens begins: where are they in the batch?
    text model (pre)     `prefill`: shorten embeddings, positions and mask; two lengths of cache
    decoder layers (pre) `prefill`: cut inside the decoder; masks and rotary tables that fit
    text model (post)    hidden states back to the caller's length
    core (post)          forget everything about this call

Later calls on the shortened cache pass `continuation` in the text model and its layers. What only
prefills need is on the layers during prefills only.

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
from transformers.utils import ModelOutput

from ..prune.budget import MethodCall
from ..prune.contract import (
    Attending,
    BeforeLLM,
    Compressing,
    Hidden,
    LayerSignal,
    MeanHidden,
    ModuleStep,
    Neurons,
    Place,
    Positions,
    ReceivedInLayer,
    RotaryAffinity,
    Signal,
    TextAttention,
)
from ..prune.errors import UnsupportedFeatureError, UnsupportedModelError
from . import probes
from .attend import Attention, attend
from .cache import Ticket, is_new, pruned_state
from .clip_text import ClipText
from .compression import evict
from .continuation import Continued, first_padding
from .devices import execution_device
from .encoding import Encoded, encode, encode_merged
from .family import IMAGE, MODALITIES, Family, Modality, Model
from .guards import check_generate
from .passing import PassingHooks
from .prefill import Chosen, Prefill, begin
from .prompt import Prompt
from .remember import ImageMemory
from .report import NO_IMAGES, Last
from .setup import Setup
from .signals import READERS, Reader, Recording

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
        self.unread: frozenset[nn.Module] = frozenset()
        """Encoder layers of the call that nobody reads."""
        self.prompt: Prompt | None = None
        """What the images that are encoded next belong to."""
        self.visual: dict[Modality, Tensor] = {}
        self.encoded: dict[Modality, Encoded] = {}
        self.handed: dict[str, Encoded | None] = {}
        """What is known of outputs that the model was given, by modality."""
        self.prefill: Prefill | None = None
        self.visual_mask: Tensor | None = None
        self.chosen: Chosen | None = None
        """Within generate(): without a cache every step prefills again, and must not choose anew
        with its newest token."""
        self.last: Last | None = None
        """What the thread's last prefill did."""
        self.unpruned: str = NO_IMAGES
        """Why the call prunes nothing, if it is a prefill."""
        self.continued: Continued | None = None
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}
        """Rotary tables of the attention modules, for methods that undo the rotation."""

    @property
    def in_call(self) -> bool:
        """Whether generate() or forward() is running, who read an encoder's output alone."""
        return self.chosen is not None or bool(self.visual)

    def forget(self) -> None:
        """What belongs to one call of the multimodal core."""
        self.visual, self.encoded, self.prefill, self.prompt = {}, {}, None, None
        self.continued, self.tables, self.unpruned = None, {}, NO_IMAGES


class Engine:
    """Everything that `patch` installs on one model; `remove()` takes all of it away."""

    def __init__(
        self,
        model: Model,
        family: Family,
        calls: tuple[MethodCall, ...],
        positions: Mapping[Place, Positions],
        clip: ClipText | None = None,
        remember_images: int = 0,
        record: bool = False,
        debug: bool = False,
    ) -> None:
        self.model, self.family, self.clip = model, family, clip
        self.core: Any = family.core(model)
        self.text: Any = family.text_model(model)
        shape = family.shape(model)
        self.setup = Setup(calls, shape, positions, self.text, Ticket(), record, debug)
        self.memory = ImageMemory(remember_images, self.setup.ticket) if remember_images else None
        self._local = _Local()
        self._warned = False
        self._undo: list[Callable[[], None]] = []
        self._listening = PassingHooks()
        self._undo.append(self._listening.remove)
        self._first = next((c.method for c in calls if isinstance(c.method, BeforeLLM)), None)
        self._needs = [
            need
            for need in (self._first.needs(shape) if self._first is not None else ())
            if not isinstance(need, LayerSignal)
        ]
        try:
            self._install()
        except BaseException:
            self.remove()
            raise

    # --- installing and removing -------------------------------------------------------------

    def _install(self) -> None:
        for modality in self.family.modalities:
            encode_one = functools.partial(self._encode, modality)
            self._override(self.core, modality.encode, encode_one)
        self._override(self.model, "generate", self._generate)
        make_masks = getattr(self.model, "create_masks_for_generate", create_masks_for_generate)
        self._override(
            self.model, "create_masks_for_generate", self._create_masks, original=make_masks
        )
        if hasattr(self.text, "_deepstack_process"):
            self._override(self.text, "_deepstack_process", self._add_deepstack)
        if hasattr(self.model, "generate_batch"):
            self._override(self.model, "generate_batch", self._refuse_batch)
        hooks = [
            self.core.register_forward_pre_hook(self._before_core, with_kwargs=True),
            self.core.register_forward_hook(self._after_core, always_call=True),
            self.text.register_forward_pre_hook(self._before_text, with_kwargs=True),
            self.text.register_forward_hook(self._after_text, always_call=True),
        ]
        if hasattr(self.model, "_hf_hook"):  # spread by accelerate, which rebuilds its arguments
            before = self.model.register_forward_pre_hook(self._before_model, with_kwargs=True)
            hooks.append(before)
        self._undo += [hook.remove for hook in hooks]
        for index, layer in enumerate(self.text.layers):
            self._install_on_layer(index, layer)

        for layer in self.family.unread_layers(self.model, {}):
            self._override(layer, "forward", functools.partial(self._run_or_pass, layer))
        encoder = self.family.vision_attention(self.model)
        listeners: dict[nn.Module, list[probes.Listener]] = {}
        for need in self._needs:
            if type(need) in READERS:
                listen = functools.partial(self._hear_encoder, need)
                listeners.setdefault(encoder[need.layer], []).append(listen)  # type: ignore[attr-defined]
        for module, heard in listeners.items():
            self._undo.append(probes.Tap(module, heard).remove)

    def _install_on_layer(self, index: int, layer: Any) -> None:
        """Hooks on a decoder layer, none where nothing is cut, asked or stored differently.

        What only listens to prefills is there during prefills only.
        """
        setup = self.setup
        needs = [need for need in setup.heard if need.layer == index]
        method = setup.on_cache.method if setup.on_cache is not None else None

        def listen(register: Callable[..., Any], call: Callable[..., Any], **options: Any) -> None:
            bound = functools.partial(call, index)
            self._listening.add(lambda: register(bound, **options).remove)  # type: ignore[no-any-return]

        # Flash attention reads gapped position ids as packed sequences: hook every layer there.
        flash = "flash" in (setup.config._attn_implementation or "")
        gapped = flash and "original" in setup.positions.values()
        behind_cut = index >= min([*setup.starts[1:], len(self.text.layers)])
        entering = Hidden | MeanHidden | RotaryAffinity
        before = functools.partial(self._before_layer, index)
        if behind_cut:
            hook = layer.register_forward_pre_hook(before, with_kwargs=True)
            self._undo.append(hook.remove)
        elif gapped or any(isinstance(need, entering) for need in needs):
            listen(layer.register_forward_pre_hook, self._before_layer, with_kwargs=True)
        steps = {need.module for need in needs if isinstance(need, ModuleStep)}
        if "attention" in steps or isinstance(method, Compressing):
            register = layer.self_attn.register_forward_hook
            listen(register, self._after_attention, with_kwargs=True)
        if "mlp" in steps:
            listen(layer.mlp.register_forward_hook, self._after_mlp)
        if any(isinstance(need, Neurons) for need in needs):
            # Adapters exchange the module while the patch is on.
            listen(
                lambda *hook: layer.mlp.down_proj.register_forward_pre_hook(*hook),
                self._before_down_proj,
            )
        ahead = [need for need in needs if isinstance(need, TextAttention) and need.ahead]
        if ahead:
            keys = functools.partial(self._project_keys, index)
            self._listening.add(lambda: _shadow(layer.self_attn.k_proj, "forward", keys))
        asked = [need for need in needs if isinstance(need, TextAttention | ReceivedInLayer)]
        listeners: list[probes.Listener] = []
        if len(asked) > len(ahead) or isinstance(method, Compressing):
            listeners.append(functools.partial(self._hear_decoder, index))
        if isinstance(method, Attending):
            note = functools.partial(self._note_tables, index)
            hook = layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
            instead = functools.partial(self._attend, index)
            self._undo += [hook.remove, probes.Tap(layer.self_attn, listeners, instead).remove]
        elif listeners:
            self._listening.add(lambda: probes.Tap(layer.self_attn, listeners).remove)

    def _override(
        self,
        owner: nn.Module,
        name: str,
        replacement: Callable[..., Any],
        original: Callable[..., Any] | None = None,
    ) -> None:
        self._undo.append(_shadow(owner, name, replacement, original))

    def remove(self) -> None:
        """Put the model back exactly as it was. A second call does nothing."""
        self.setup.ticket.active = False
        if self.memory is not None:
            self.memory.forget()
        while self._undo:
            self._undo.pop()()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedFeatureError(
            "A patched model cannot be copied or pickled, because its hooks belong to this one "
            "object: call vlmprune.unpatch(model) first. model.save_pretrained() works as it is."
        )

    # --- generate() --------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inside = any(set(call.method.places) - {Place.BEFORE_LLM} for call in self.setup.calls)
        check_generate(self.model, kwargs, inside_the_llm=inside)
        if kwargs.get("visual_mask") is not None and kwargs.get("inputs_embeds") is None:
            raise UnsupportedFeatureError(_MASK_WITHOUT_EMBEDS)
        local = self._local
        local.visual_mask, local.chosen = kwargs.pop("visual_mask", None), {}
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if ids is not None:
            local.prompt = self._prompt(ids, kwargs.get("attention_mask"))
        earlier, local.last = local.last, None
        try:
            output = original(*args, **kwargs)
            if isinstance(output, ModelOutput):
                output.vlmprune_last = local.last
            return output
        finally:
            local.visual_mask, local.chosen, local.prompt = None, None, None
            local.last = local.last or earlier

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
            kwargs["attention_mask"] = first_padding(self.setup, state, cache, queries)
        return original(**kwargs)

    # --- vision encoder ----------------------------------------------------------------------

    @torch.compiler.disable
    def _encode(
        self, modality: Modality, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self._local.recording is not None:  # Qwen3-VL encodes videos as it does images
            return original(*args, **kwargs)
        inputs = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
        inputs |= inputs.pop("kwargs", {})
        encode_images = functools.partial(self._encode_images, modality, original)
        if self.memory is None or not self._local.in_call:
            output, encoded = encode_images(inputs)
        else:
            output, encoded = self.memory.encode(
                self.family, self.model, modality, inputs, encode_images
            )
        if encoded is not None:
            setattr(output, _MARK, encoded)
            self._local.encoded[modality] = encoded
        return output

    def _encode_images(
        self, modality: Modality, original: Callable[..., Any], inputs: Mapping[str, Any]
    ) -> tuple[Any, Encoded | None]:
        """Images on their way through the encoder, and what was chosen of them."""
        self._local.recording = recording = Recording()
        if self._local.in_call:  # another caller may read all that the encoder gives
            self._local.unread = self._unread(inputs)
        try:
            output = original(**inputs)
        finally:
            self._local.recording, self._local.unread = None, frozenset()
        features = getattr(output, "pooler_output", None)
        if features is None:  # return_dict=False: a plain tuple cannot carry the choice
            return output, None
        tilings = self.family.tilings(self.model, modality, features, inputs)
        for tiling, feature in zip(tilings, features, strict=True):
            if tiling.num_tokens != len(feature):
                raise UnsupportedModelError(
                    f"An {modality.name} gave {len(feature)} visual tokens, but its layout has "
                    f"{tiling.num_tokens}: this variant of {self.family.name} is not supported."
                )
        signals: list[dict[Signal, Tensor]] = [{} for _ in features]
        if self._first is not None:
            reader = Reader(
                self.family,
                self.model,
                modality,
                output=output,
                inputs=inputs,
                features=features,
                tilings=tilings,
                recording=recording,
                prompt=self._local.prompt,
                clip=self.clip,
            )
            signals = reader.read(self._first)
        encoded = encode(self.setup, tilings, signals, features[0].device)
        output.pooler_output = self._emit(features, encoded)
        return output, encoded

    @property
    def last(self) -> Last | None:
        """What the last prefill of this thread did."""
        return self._local.last

    @property
    def unread_layers(self) -> int:
        """Encoder layers that do not run in `forward` and `generate`."""
        return len(self._unread({}))

    def _unread(self, inputs: Mapping[str, Any]) -> frozenset[nn.Module]:
        """Encoder layers behind the deepest one that the projector or a signal reads."""
        encoder = self.family.vision_attention(self.model)
        heard = {encoder[need.layer] for need in self._needs if type(need) in READERS}  # type: ignore[attr-defined]
        unread: list[nn.Module] = []
        for layer in reversed(self.family.unread_layers(self.model, inputs)):
            if any(module in heard for module in layer.modules()):
                break
            unread.append(layer)
        return frozenset(unread)

    def _run_or_pass(
        self, layer: nn.Module, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """An encoder layer, or its input where nobody reads its output: offloaded weights of it
        are then not loaded either."""
        if layer not in self._local.unread:
            return original(*args, **kwargs)
        return args[0] if args else kwargs["hidden_states"]

    def _emit(self, features: Any, encoded: Encoded) -> Any:
        """The encoder's features with merged and moved rows in their slots."""
        emitted = []
        for feature, image in zip(features, encoded.images, strict=True):
            chosen = image.selection
            projected = chosen.features
            if projected is not None and not chosen.projected:
                projected = self.family.project(self.model, projected.to(feature.dtype))
            emitted.append(image.emit(feature, projected))
        return torch.stack(emitted) if isinstance(features, Tensor) else type(features)(emitted)

    def _emit_merged(self, embeds: Tensor, visual: Tensor, encoded: Encoded) -> Tensor:
        """`embeds` (B, L, D) with merged and moved rows in their slots."""
        if all(image.as_is for image in encoded.images):
            return embeds
        features = embeds[visual].split([image.num_tokens for image in encoded.images])
        return embeds.masked_scatter(visual[..., None], torch.cat(self._emit(features, encoded)))

    @torch.compiler.disable
    def _hear_encoder(
        self, need: Signal, query: Tensor, key: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> None:
        if self._local.recording is not None:
            with torch.no_grad():
                self._local.recording.hear(need, query, key, scaling, **kwargs)

    # --- multimodal core ---------------------------------------------------------------------

    @torch.compiler.disable
    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        outputs: Mapping[str, Any] = kwargs.get("mm_encoder_outputs") or {}
        self._local.handed = {name: getattr(o, _MARK, None) for name, o in outputs.items()}

    @torch.compiler.disable
    def _before_core(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        local = self._local
        self._forget()  # of an earlier call that was interrupted
        outputs: Mapping[str, Any] = kwargs.get("mm_encoder_outputs") or {}
        ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        explicit = kwargs.pop("visual_mask", None)
        if embeds is not None and explicit is None:
            explicit, local.visual_mask = local.visual_mask, None
        if embeds is None and explicit is not None:
            raise UnsupportedFeatureError(_MASK_WITHOUT_EMBEDS)
        for modality in MODALITIES:
            output, pixels = outputs.get(modality.name), kwargs.get(modality.pixels)
            if output is None and pixels is None:
                continue
            self._refuse_modality(modality)
            local.visual[modality] = self._placeholders(modality, ids, embeds)
            if output is not None:
                local.encoded[modality] = self._own(output, local.handed.get(modality.name))
            elif ids is not None:
                local.prompt = self._prompt(ids, kwargs.get("attention_mask"))
        if not local.visual and embeds is not None:
            if explicit is not None:
                repeats = embeds.shape[0] // explicit.shape[0]
                marked = explicit.to(embeds.device, torch.bool).repeat_interleave(repeats, 0)
                local.visual[IMAGE] = marked
            elif not _seen(kwargs.get("past_key_values")):
                self._not_pruned()
        return args, kwargs

    def _refuse_modality(self, modality: Modality) -> None:
        if modality not in self.family.modalities:
            raise UnsupportedFeatureError(
                f"{modality.name.capitalize()} inputs of {self.family.name} are not supported yet: "
                f"unpatch the model (vlmprune.unpatch(model)) for {modality.name}s."
            )

    def _placeholders(
        self, modality: Modality, ids: Tensor | None, embeds: Tensor | None
    ) -> Tensor:
        """(B, L) bool: the columns of the modality's placeholders."""
        token = getattr(self.model.config, modality.token)
        if embeds is None:
            return ids == token  # type: ignore[return-value]
        row = self.core.get_input_embeddings()(torch.tensor(token, device=embeds.device))
        row = row.to(embeds.device)
        marked: Tensor = (embeds == row).all(-1)
        return marked

    def _own(self, output: Any, handed: Encoded | None) -> Encoded:
        """What this patch knows of an encoder output that it is handed, or a copy of it."""
        encoded: Encoded | None = getattr(output, _MARK, handed)
        if encoded is None or encoded.owner is not self.setup.ticket:
            raise UnsupportedFeatureError(
                "mm_encoder_outputs was not made by this patch, so that nothing is known "
                "of its images: pass pixel_values, or encode again on the patched model."
            )
        return encoded

    def _prompt(self, ids: Tensor, mask: Tensor | None) -> Prompt:
        config = self.model.config
        placeholders = {m: getattr(config, m.token) for m in self.family.modalities}
        return Prompt(ids, mask, placeholders)

    def _not_pruned(self) -> None:
        note = (
            "inputs_embeds came without pixel_values, so that visual tokens cannot be told from "
            "text: nothing was pruned. Pass visual_mask= (B, L) bool to mark them."
        )
        self._local.unpruned = note
        if not self._warned:
            self._warned = True
            warnings.warn(note, UserWarning, stacklevel=2)

    @torch.compiler.disable
    def _after_core(self, module: nn.Module, args: Any, output: Any) -> None:
        self._forget()

    def _forget(self) -> None:
        """Everything about a call."""
        if self._local.prefill is not None:
            self._listening.off()
        self._local.forget()

    # --- text model: prefill -----------------------------------------------------------------

    @torch.compiler.disable
    def _before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        local = self._local
        if not local.visual:
            cache = kwargs.get("past_key_values")
            state = pruned_state(cache)
            if state is None:
                if is_new(cache):
                    setup = self.setup
                    local.last = Last.nothing(
                        setup.reported_positions, setup.shape.decoder.num_layers, local.unpruned
                    )
                return None
            kwargs = dict(kwargs)
            local.continued = Continued.begin(self.setup, state, kwargs)
            return args, kwargs
        kwargs = dict(kwargs)
        embeds = kwargs["inputs_embeds"]
        visual = {m: marks.to(embeds.device) for m, marks in local.visual.items()}
        encoded: Mapping[Modality, Encoded] = local.encoded
        if not encoded:  # the caller merged images into its embeddings and marked them
            marks = visual[IMAGE]
            merged = encode_merged(self.setup, self._needs, embeds, marks)
            kwargs["inputs_embeds"] = self._emit_merged(embeds, marks, merged)
            encoded = {IMAGE: merged}
        self._refuse_checkpointing(encoded)
        prefill, last = begin(self.setup, encoded, visual, kwargs, local.chosen)
        if prefill is None:
            local.last = last
            return args, kwargs
        self._listening.on()
        local.prefill = prefill
        return args, kwargs

    def _refuse_checkpointing(self, encoded: Mapping[Modality, Encoded]) -> None:
        images = [image for of_call in encoded.values() for image in of_call.images]
        in_decoder = any(stage.layer for image in images for stage in image.plan)
        if in_decoder and self.text.training and self.text.gradient_checkpointing:
            raise UnsupportedFeatureError(
                "Pruning inside the decoder cannot be combined with gradient checkpointing, which "
                "runs layers a second time: call model.activation_checkpointing_disable() or "
                "model.eval(), or use a method that acts before the LLM."
            )

    # --- decoder layers ----------------------------------------------------------------------

    @torch.compiler.disable
    def _before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prefill, continued = self._local.prefill, self._local.continued
        if prefill is None and (continued is None or not continued.helps(layer, kwargs)):
            return None
        hidden, *rest = args
        device = execution_device(module)  # of a sharded model, it may be another than the last
        hidden = hidden if device is None else hidden.to(device)
        if prefill is not None:
            hidden, kwargs = prefill.enter_layer(layer, module, hidden, kwargs)
            return (hidden, *rest), {**kwargs, "position_ids": None}
        assert continued is not None  # noqa: S101  (for the types)
        return (hidden, *rest), continued.layer(layer, hidden, kwargs)

    @torch.compiler.disable
    def _hear_decoder(
        self, layer: int, query: Tensor, key: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> None:
        if self._local.prefill is not None:
            with torch.no_grad():
                self._local.prefill.hear_attention(layer, query, key, scaling)

    @torch.compiler.disable
    def _after_attention(
        self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any
    ) -> None:
        if self._local.prefill is not None:
            with torch.no_grad():
                given = kwargs["hidden_states"]
                self._local.prefill.hear_step(layer, "attention", given, output[0])
                self._local.prefill.after_attention(layer, module, kwargs)

    @torch.compiler.disable
    def _after_mlp(
        self, layer: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        if self._local.prefill is not None:
            with torch.no_grad():
                self._local.prefill.hear_step(layer, "mlp", args[0], output)

    @torch.compiler.disable
    def _before_down_proj(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._local.prefill is not None:
            with torch.no_grad():
                self._local.prefill.hear_neurons(layer, args[0])

    def _project_keys(
        self, layer: int, original: Callable[[Tensor], Tensor], given: Tensor
    ) -> Tensor:
        prefill = self._local.prefill
        keys = None if prefill is None else prefill.keys_of(layer, given)
        return original(given) if keys is None else keys

    @torch.compiler.disable
    def _note_tables(
        self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> None:
        self._local.tables[layer] = kwargs["position_embeddings"]

    @torch.compiler.disable
    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        prefill, continued = self._local.prefill, self._local.continued
        at = prefill or continued
        given = Attention(query, key, value, mask)
        if at is not None and at.state is not None:
            tables = self._local.tables.pop(layer)
            given = attend(self.setup, at.state, at.cache, layer, given, tables)
        return given.query, given.key, given.value, given.mask

    @torch.compiler.disable
    def _add_deepstack(
        self, original: Callable[..., Tensor], hidden: Tensor, visual: Tensor, features: Tensor
    ) -> Tensor:
        """Qwen3-VL adds visual features of their own behind its first layers."""
        prefill = self._local.prefill
        if prefill is None:
            return original(hidden, visual, features)
        visual, rows = prefill.visual_alive(visual.to(hidden.device))
        return original(hidden, visual, features.to(hidden.device)[rows])

    @torch.compiler.disable
    def _after_text(self, module: nn.Module, args: Any, output: Any) -> Any:
        local = self._local
        prefill, local.prefill = local.prefill, None
        continued, local.continued = local.continued, None
        if prefill is not None:
            self._listening.off()
        if output is None:
            return None
        if continued is not None:
            evict(self.setup, continued.cache, continued.state, continued.new)
        if prefill is None:
            return None
        if isinstance(output, tuple):
            output = (prefill.finish(output[0]), *output[1:])
        else:
            output.last_hidden_state = prefill.finish(output.last_hidden_state)
        local.last = prefill.last
        return output


def _seen(cache: Any) -> Any:
    """Tokens fed into a cache so far, 0 without one."""
    return cache.get_seq_length() if cache is not None else 0


def _shadow(
    owner: nn.Module,
    name: str,
    replacement: Callable[..., Any],
    original: Callable[..., Any] | None = None,
) -> Callable[[], None]:
    """Shadow a method on the instance, with the original as the first argument of `replacement`;
    returns what undoes it."""
    original = original or getattr(owner, name)
    shadowed = owner.__dict__.get(name)
    bound = functools.wraps(original)(functools.partial(replacement, original))
    owner.__dict__[name] = bound

    def undo() -> None:
        if shadowed is None:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = shadowed

    return undo
