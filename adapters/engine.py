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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from ..prune.contract import Place, Signal
from ..prune.errors import UnsupportedFeatureError, UnsupportedModelError
from .budgets import Budgets
from .cache.continuation import Continued, first_padding
from .cache.pruned import is_new, pruned_state
from .checks import check_generate
from .devices import execution_device
from .family import IMAGE, MODALITIES, Call, Family, Modality, Model
from .hooks import Hooks, Spot, Spots, Undo
from .patch_setup import Setup
from .places.before_llm import Encoded, encode, encode_merged
from .places.beginning import begin
from .places.cache_attend import Attention, attend
from .places.cache_evict import evict
from .places.choosing import Chosen
from .places.prefill import Prefill
from .remember import ImageMemory
from .report import DISABLED, NO_IMAGES, Last
from .sequence.prompt import Prompt
from .signals import tap as probes
from .signals.encoder import Reader, Recording

_MARK = "_vlmprune_encoded"
"""Attribute of the encoder's output that carries `Encoded` through generate()."""

_AT = {
    "enter": "_before_layer",
    "tables": "_note_tables",
    "attention": "_after_attention",
    "mlp": "_after_mlp",
    "neurons": "_before_down_proj",
    "keys": "_project_keys",
    "tap": "_hear_decoder",
}
"""What is called at each kind of spot of a decoder layer."""

_Keywords = dict[str, Any] | None
"""Missing where another thread is just putting the hook on or taking it off: see `Hooks`."""

Wish = Budgets | Literal["dense"]
"""What a thread asks for its calls."""

_MASK_WITHOUT_EMBEDS = (
    "visual_mask= marks visual tokens inside inputs_embeds, and none were given: leave it out, "
    "input_ids and pixel_values tell by themselves."
)


class _Local(threading.local):
    """What belongs to the call in flight of one thread."""

    def __init__(self) -> None:
        self.wish: Wish | None = None
        self.setup: Setup | None = None
        """What the call runs with, fixed when it began; None: without any method."""
        self.held: list[Spots] = []
        """Hooks that are there for this call."""
        self.tapped: Mapping[int, list[Signal]] = {}
        """What is read in attention layers of the encoder."""
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
    """Everything that `patch` installs on one model; `remove()` takes all of it away.

    What is on the model at all times asks `_local` what belongs to the call of its thread. Hooks
    that depend on the methods are at `Spots`, for as long as the setup or a call needs them.
    """

    def __init__(
        self, model: Model, family: Family, setup: Setup, remember_images: int = 0
    ) -> None:
        self.model, self.family = model, family
        self.core: Any = family.core
        self.text: Any = family.text_model
        self.setup = setup
        """What calls that begin now run with, where their threads ask for nothing else."""
        self.memory = ImageMemory(remember_images) if remember_images else None
        self._local = _Local()
        self._warned = False
        self._undo: list[Callable[[], None]] = []
        self._names = probes.Names(model)
        self._hooks = Hooks(self._install_at)
        self._exchange = threading.Lock()
        try:
            self._install()
            self._name_taps()
            self._hooks.hold(setup.standing)
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
        for layer in self.family.unread_layers({}):
            self._override(layer, "forward", functools.partial(self._run_or_pass, layer))

    def _install_at(self, spot: Spot) -> Undo:
        """The hook of a spot: `Setup.standing` and `Setup.passing` say which are needed."""
        what, index = spot
        if what == "encoder":
            attention = self.family.vision_attention[index]
            hear = functools.partial(self._hear_encoder, index)
            return probes.Tap(attention, self._names, [hear]).remove
        layer = self.text.layers[index]
        own = functools.partial(getattr(self, _AT[what]), index)
        match what:
            case "enter":
                return layer.register_forward_pre_hook(own, with_kwargs=True).remove  # type: ignore[no-any-return]
            case "tables":
                return layer.self_attn.register_forward_pre_hook(own, with_kwargs=True).remove  # type: ignore[no-any-return]
            case "attention":
                return layer.self_attn.register_forward_hook(own, with_kwargs=True).remove  # type: ignore[no-any-return]
            case "mlp":
                return layer.mlp.register_forward_hook(own).remove  # type: ignore[no-any-return]
            case "neurons":  # adapters exchange the module while the patch is on
                return layer.mlp.down_proj.register_forward_pre_hook(own).remove  # type: ignore[no-any-return]
            case "keys":
                return _shadow(layer.self_attn.k_proj, "forward", own)
        instead = functools.partial(self._attend, index)
        return probes.Tap(layer.self_attn, self._names, [own], instead).remove

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
        self._hooks.take_off()
        self._names.release()
        while self._undo:
            self._undo.pop()()

    def put_back(self) -> None:
        """Patch the model again as it was before `remove()`."""
        self.setup.ticket.active = True
        self._install()
        self._name_taps()
        self._hooks.put_back()

    def _name_taps(self) -> None:
        """Names of taps that the setup needs: they stay while taps come and go."""
        for what, index in self.setup.standing | self.setup.passing:
            if what == "encoder":
                encoder = self.family.vision_attention
                self._names.of(encoder[index].config._attn_implementation)
            elif what == "tap":
                self._names.of(self.text.layers[index].self_attn.config._attn_implementation)

    # --- what calls run with -----------------------------------------------------------------

    def exchange(self, setup: Setup) -> None:
        """Let calls that begin from now on run with another setup; others end with theirs."""
        with self._exchange:
            self._hooks.hold(setup.standing)
            before, self.setup = self.setup, setup
            self._name_taps()
            self._hooks.release(before.standing)

    def wanted(self) -> Setup | None:
        """What a call that begins now in this thread runs with; None: without any method."""
        wish = self._local.wish
        if wish is None:
            return self.setup
        return wish.applied(self.setup) if isinstance(wish, Budgets) else None

    @contextmanager
    def wishing(self, wish: Wish) -> Iterator[None]:
        """Calls of this thread that begin within it run with something else."""
        local = self._local
        outer, local.wish = local.wish, wish
        try:
            yield
        finally:
            local.wish = outer

    def _hold(self, spots: Spots) -> None:
        """Until this call is over."""
        if spots:
            self._hooks.hold(spots)
            self._local.held.append(spots)

    def _release(self) -> None:
        while self._local.held:
            self._hooks.release(self._local.held.pop())

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise UnsupportedFeatureError(
            "A patched model cannot be copied or pickled, because its hooks belong to this one "
            "object: call vlmprune.unpatch(model) first. model.save_pretrained() works as it is."
        )

    # --- generate() --------------------------------------------------------------------------

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (setup := self.wanted()) is not None:
            check_generate(self.model, kwargs, inside_the_llm=setup.inside_the_llm)
        if kwargs.get("visual_mask") is not None and kwargs.get("inputs_embeds") is None:
            raise UnsupportedFeatureError(_MASK_WITHOUT_EMBEDS)
        local = self._local
        outer = local.setup, local.visual_mask, local.chosen, local.prompt
        standing = setup.standing if setup is not None else frozenset()
        earlier = local.last
        self._hooks.hold(standing)
        try:
            local.setup, local.chosen, local.last = setup, {}, None
            local.visual_mask = kwargs.pop("visual_mask", None)
            ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            if ids is not None:
                local.prompt = self._prompt(ids, kwargs.get("attention_mask"))
            output = original(*args, **kwargs)
            if isinstance(output, ModelOutput):
                output.vlmprune_last = local.last
            return output
        finally:
            self._hooks.release(standing)
            local.setup, local.visual_mask, local.chosen, local.prompt = outer
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
            kwargs["attention_mask"] = first_padding(state, cache, queries)
        return original(**kwargs)

    # --- vision encoder ----------------------------------------------------------------------

    @torch.compiler.disable
    def _encode(
        self, modality: Modality, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        local = self._local
        if local.recording is not None:  # Qwen3-VL encodes videos as it does images
            return original(*args, **kwargs)
        setup = local.setup if local.in_call else self.wanted()
        if setup is None:
            return original(*args, **kwargs)
        inputs = dict(inspect.signature(original).bind(*args, **kwargs).arguments)
        inputs |= inputs.pop("kwargs", {})
        call = Call(modality, inputs)
        encode_images = functools.partial(self._encode_images, setup, original)
        if self.memory is None or not local.in_call:
            output, encoded = encode_images(call)
        else:
            output, encoded = self.memory.encode(self.family, call, encode_images, setup)
        if encoded is not None:
            setattr(output, _MARK, encoded)
            local.encoded[modality] = encoded
        return output

    def _encode_images(
        self,
        setup: Setup,
        original: Callable[..., Any],
        call: Call,
        numbers: Sequence[int] | None = None,
    ) -> tuple[Any, Encoded | None]:
        """Images on their way through the encoder, and what was chosen of them; `numbers`: which
        images of the call they are, where not all."""
        local = self._local
        local.recording, local.tapped = (recording := Recording()), setup.tapped
        if local.in_call:  # another caller may read all that the encoder gives
            local.unread = self._unread(setup, call.inputs)
        self._hooks.hold(setup.standing)
        try:
            output = original(**call.inputs)
        finally:
            self._hooks.release(setup.standing)
            local.recording, local.tapped, local.unread = None, {}, frozenset()
        features = getattr(output, "pooler_output", None)
        if features is None:  # return_dict=False: a plain tuple cannot carry the choice
            return output, None
        tilings = self.family.tilings(call, features)
        for tiling, feature in zip(tilings, features, strict=True):
            if tiling.num_tokens != len(feature):
                raise UnsupportedModelError(
                    f"An {call.modality.name} gave {len(feature)} visual tokens, but its layout "
                    f"has {tiling.num_tokens}: this variant of {self.family.name} is not supported."
                )
        signals: list[dict[Signal, Tensor]] = [{} for _ in features]
        if setup.first is not None:
            reader = Reader(
                self.family,
                call,
                output=output,
                features=features,
                tilings=tilings,
                recording=recording,
                prompt=local.prompt,
                clip=setup.clip,
            )
            signals = reader.read(setup.first)
        if setup.per_image is not None:  # an earlier modality of the call has the first budgets
            others = [one for other, one in local.encoded.items() if other is not call.modality]
            before = sum(len(one.images) for one in others) if local.in_call else 0
            numbers = range(len(tilings)) if numbers is None else numbers
            numbers = [before + number for number in numbers]
        encoded = encode(setup, tilings, signals, features[0].device, numbers)
        output.pooler_output = self._emit(features, encoded)
        return output, encoded

    @property
    def last(self) -> Last | None:
        """What the last prefill of this thread did."""
        return self._local.last

    @property
    def unread_layers(self) -> int:
        """Encoder layers that do not run in `forward` and `generate`."""
        return len(self._unread(self.setup, {}))

    def _unread(self, setup: Setup, inputs: Mapping[str, Any]) -> frozenset[nn.Module]:
        """Encoder layers behind the deepest one that the projector or a signal reads."""
        encoder = self.family.vision_attention
        heard = {encoder[layer] for layer in setup.tapped}
        unread: list[nn.Module] = []
        for layer in reversed(self.family.unread_layers(inputs)):
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
                projected = self.family.project(projected.to(feature.dtype))
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
        self, layer: int, query: Tensor, key: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> None:
        if self._local.recording is not None:
            with torch.no_grad():
                for need in self._local.tapped.get(layer, ()):
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
        if local.chosen is None:  # else generate() has fixed it
            local.setup = self.wanted()
        dense = local.setup is None
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
            if dense and local.handed.get(modality.name, getattr(output, _MARK, None)) is None:
                local.unpruned = DISABLED
                continue
            self._refuse_modality(modality)
            local.visual[modality] = self._placeholders(modality, ids, embeds)
            if output is not None:
                local.encoded[modality] = self._own(output, local.handed.get(modality.name))
            elif ids is not None:
                local.prompt = self._prompt(ids, kwargs.get("attention_mask"))
        if not dense and not local.visual and embeds is not None:
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
        if encoded is None or encoded.setup.ticket is not self.setup.ticket:
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
        self._release()
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
            if state.setup is not local.setup or local.chosen is None:  # else generate() holds
                self._hold(state.setup.standing)
            kwargs = dict(kwargs)
            local.continued = Continued.begin(state, kwargs)
            return args, kwargs
        kwargs = dict(kwargs)
        embeds = kwargs["inputs_embeds"]
        visual = {m: marks.to(embeds.device) for m, marks in local.visual.items()}
        encoded: Mapping[Modality, Encoded] = local.encoded
        if not encoded:  # the caller merged images into its embeddings and marked them
            marks = visual[IMAGE]
            setup = local.setup or self.setup
            merged = encode_merged(setup, embeds, marks)
            kwargs["inputs_embeds"] = self._emit_merged(embeds, marks, merged)
            encoded = {IMAGE: merged}
        self._refuse_checkpointing(encoded)
        prefill, last = begin(encoded, visual, kwargs, local.chosen)
        if prefill is None:
            local.last = last
            return args, kwargs
        self._hold(prefill.setup.standing)
        self._hold(prefill.setup.passing)
        local.prefill = prefill
        return args, kwargs

    def _refuse_checkpointing(self, encoded: Mapping[Modality, Encoded]) -> None:
        images = [image for of_call in encoded.values() for image in of_call.images]
        in_decoder = any(stage.place is Place.DECODER for image in images for stage in image.plan)
        if in_decoder and self.text.training and self.text.gradient_checkpointing:
            raise UnsupportedFeatureError(
                "Pruning inside the decoder cannot be combined with gradient checkpointing, which "
                "runs layers a second time: call model.activation_checkpointing_disable() or "
                "model.eval(), or use a method that acts before the LLM."
            )

    # --- decoder layers ----------------------------------------------------------------------

    @torch.compiler.disable
    def _before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: _Keywords = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prefill, continued = self._local.prefill, self._local.continued
        if kwargs is None:  # another thread puts it on or takes it off
            return None
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
                self._local.prefill.show_heads(layer, query, key, scaling)

    @torch.compiler.disable
    def _after_attention(
        self, layer: int, module: nn.Module, args: Any, kwargs: Any, *output: Any
    ) -> None:
        if self._local.prefill is not None and output:  # else another thread puts it on or off
            with torch.no_grad():
                given = kwargs["hidden_states"]
                self._local.prefill.show("attention", layer, given, output[0][0])
                self._local.prefill.after_attention(layer, module, kwargs)

    @torch.compiler.disable
    def _after_mlp(
        self, layer: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        if self._local.prefill is not None:
            with torch.no_grad():
                self._local.prefill.show("mlp", layer, args[0], output)

    @torch.compiler.disable
    def _before_down_proj(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._local.prefill is not None:
            with torch.no_grad():
                self._local.prefill.show("activations", layer, args[0])

    def _project_keys(
        self, layer: int, original: Callable[[Tensor], Tensor], given: Tensor
    ) -> Tensor:
        prefill = self._local.prefill
        keys = None if prefill is None else prefill.keys_of(layer, given)
        return original(given) if keys is None else keys

    @torch.compiler.disable
    def _note_tables(
        self, layer: int, module: nn.Module, args: Any, kwargs: _Keywords = None
    ) -> None:
        if kwargs is not None:
            self._local.tables[layer] = kwargs["position_embeddings"]

    @torch.compiler.disable
    def _attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Any
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        prefill, continued = self._local.prefill, self._local.continued
        at = prefill or continued
        given = Attention(query, key, value, mask)
        tables = self._local.tables.pop(layer, None)
        if tables is not None and at is not None and at.state is not None:
            given = attend(at.setup, at.state, at.cache, layer, given, tables)
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
        self._release()
        if output is None:
            return None
        if continued is not None:
            evict(continued.setup, continued.cache, continued.state, continued.new)
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
