"""The machinery between a patched model and its methods: what `patch` installs, and the life of a
call.

One forward runs through these places, in order:

    get_image_features   `before_llm`: read signals, count, choose before the LLM
    core (pre-hook)      a call of the model begins: where are its visual tokens in the batch?
    text model (pre)     `decoder`, `beginning`: shorter embeddings, positions, mask; a pruned cache
    decoder layers (pre) `prefill`: cut inside the decoder; `layer_inputs`: masks, tables that fit
    attention (post)     `cache_evict`: entries leave what the layer has stored
    text model (post)    hidden states back to the caller's length
    core (post)          forget everything about this call

Later calls on the shortened cache pass `cache.continuation` in the text model and its layers. What
only prefills need is on the layers during prefills only.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..prune.budget import MethodCall
from ..prune.contract import Positions
from ..prune.errors import UnsupportedFeatureError
from .both_ways import Given
from .budgets import Budgets
from .cache.continuation import shortened_mask
from .cache.pruned import pruned_state
from .cache_names import cache_given
from .checks.calls import check_mask
from .checks.patches import refuse_compiled
from .clip_text import ClipText
from .encoded import MARK, Encoded
from .family import IMAGE, MODALITIES, Family, Modality, Model
from .generation import Generation
from .hooks import Undo, before, behind
from .installed import Installed
from .patch_setup import Setup
from .places.before_llm import BeforeLLMDriver
from .places.cache_attend import CacheAttendDriver
from .places.cache_evict import CacheEvictDriver
from .places.call import InFlight
from .places.decoder import DecoderDriver
from .places.encoder import EncoderDriver
from .places.heads import HeadsDriver
from .places.neurons import NeuronsDriver
from .places.taps import DecoderTaps
from .prepare import make_setup
from .remember import ImageMemory
from .report import DISABLED
from .sequence.prompt import Prompt
from .signals.decoder import Heads


class Engine(Installed):
    """Everything that `patch` installs on a vision-language model."""

    _flight: InFlight

    def __init__(
        self, model: Model, family: Family, setup: Setup, remember_images: int = 0
    ) -> None:
        super().__init__(model, setup)
        self.family = family
        self.core: Any = family.core
        self.fit = family.fit
        self.memory = ImageMemory(remember_images) if remember_images else None
        self._flight = InFlight(self._hooks)
        self._warned = False
        text: Any = family.text_model
        encoders = [self._encoder(view) for view in family.views]
        self._before_llm = [
            BeforeLLMDriver(view, encoder, self._hooks, self._flight, self.wanted, self.memory)
            for view, encoder in zip(family.views, encoders, strict=True)
        ]
        decoder = DecoderDriver(
            text, family.layer_names, self._flight, self._before_llm[0], lambda: self.setup
        )
        evict, attend = CacheEvictDriver(text, self._flight), CacheAttendDriver(text, self._flight)
        neurons = NeuronsDriver(text, family.layer_names, self._flight)
        heads = HeadsDriver(self._flight)

        def hear(layer: int, seen: Heads) -> None:
            decoder.hear(layer, heads.narrowed(layer, seen))

        taps = DecoderTaps(text, self._names, [hear, evict.hear], attend.exchange, heads.around)
        self._generation = Generation(family, self._hooks, self._flight, self.wanted, self._prompt)
        # Those on the cache before the decoder's, which ends a call on the text model.
        self._start([*encoders, *self._before_llm, evict, attend, heads, neurons, decoder, taps])

    def _encoder(self, view: Family) -> EncoderDriver:
        """What drives one vision encoder."""
        skippable = view.unread_layers({})
        return EncoderDriver(
            view.vision_attention, skippable, self._names, view.encoder, view.projectors
        )

    # --- installing and removing -------------------------------------------------------------

    def _install_own(self) -> Iterator[Undo]:
        yield self._generation.install()
        yield before(self.core, self._before_core, with_kwargs=True)
        yield behind(self.core, self._after_core, always=True)
        if hasattr(self.model, "_hf_hook"):  # spread by accelerate, which rebuilds its arguments
            yield before(self.model, self._before_model, with_kwargs=True)

    # --- what calls run with -----------------------------------------------------------------

    def planned(
        self,
        calls: tuple[MethodCall, ...],
        positions: Positions | None,
        clip: ClipText | None,
    ) -> Setup:
        remembered = 0 if self.memory is None else self.memory.capacity
        return make_setup(self.model, self.family, calls, positions, clip, remembered)

    def check(self, budgets: Budgets) -> Setup:
        return budgets.check(self.setup, self.family.fixed_tokens)

    def refuse_compiled(self) -> None:
        refuse_compiled(self.model, self.core, self.family.text_model)

    @property
    def unread_layers(self) -> int:
        return len(self._before_llm[0].unread(self.setup, {}))

    # --- a call of the model -----------------------------------------------------------------

    @torch.compiler.disable
    def _before_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        outputs: Mapping[str, Any] = kwargs.get("mm_encoder_outputs") or {}
        self._flight.handed = {name: getattr(o, MARK, None) for name, o in outputs.items()}

    @torch.compiler.disable
    def _before_core(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        flight = self._flight
        flight.forget()  # an earlier call that was interrupted
        if flight.chosen is None:  # else generate() has fixed it
            flight.setup = self.wanted()
        embeds = kwargs.get("inputs_embeds")
        marks = kwargs.pop("visual_mask", None)
        if embeds is not None and marks is None:
            marks, flight.visual_mask = flight.visual_mask, None
        check_mask(marks, embeds)
        ids = args[0] if args else kwargs.get("input_ids")
        self._find_images(ids, embeds, kwargs)
        if flight.setup is not None and not flight.visual and embeds is not None:
            if marks is not None:
                repeats = embeds.shape[0] // marks.shape[0]
                marked = marks.to(embeds.device, torch.bool).repeat_interleave(repeats, 0)
                flight.visual[IMAGE] = marked
            elif not _seen(cache_given(kwargs)):
                self._not_pruned()
        fed = ids if embeds is None else embeds
        if self.family.makes_masks and fed is not None:
            kwargs = self._for_masks(fed, kwargs)
        return args, kwargs

    def _for_masks(self, fed: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a core that makes the decoder's masks: it may do so from the whole prompt,
        which `beginning` shortens, but behind one from what its cache stores.

        Args:
            fed: (B, L, ...), what the caller feeds.
        """
        flight, mask, cache = self._flight, kwargs.get("attention_mask"), cache_given(kwargs)
        if flight.visual:
            flight.given = Given(mask, kwargs.get("position_ids"), self.family.both_ways(kwargs))
            return kwargs
        state = pruned_state(cache)
        if state is None or (mask is not None and getattr(mask, "ndim", None) != 2):
            return kwargs
        short = shortened_mask(state, cache, mask, fed.shape[1], fed.device)
        return {**kwargs, "attention_mask": short}

    def _find_images(
        self, ids: Tensor | None, embeds: Tensor | None, kwargs: Mapping[str, Any]
    ) -> None:
        """Note where the visual tokens of the call are, and what is known of its images."""
        flight = self._flight
        outputs: Mapping[str, Any] = kwargs.get("mm_encoder_outputs") or {}
        for modality in MODALITIES:
            output, pixels = outputs.get(modality.name), kwargs.get(modality.pixels)
            if output is None and pixels is None:
                continue
            handed = flight.handed.get(modality.name)
            if flight.setup is None and (handed or getattr(output, MARK, None)) is None:
                flight.unpruned = DISABLED
                continue
            self._refuse_modality(modality)
            flight.visual[modality] = self._placeholders(modality, ids, embeds)
            if output is not None:
                flight.encoded[modality] = self._own(output, handed)
            else:
                flight.prompt = self._prompt(ids, embeds, kwargs.get("attention_mask"))
        if len({self.family.placeholder(one) for one in flight.visual}) < len(flight.visual):
            raise UnsupportedFeatureError(
                f"{' and '.join(one.name + 's' for one in flight.visual)} of {self.family.name} "
                f"have the same placeholders, and one call of the model cannot tell them apart: "
                f"give them in calls of their own."
            )

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
        if embeds is None:
            return ids == self.family.placeholder(modality)  # type: ignore[return-value]
        marked: Tensor = (embeds == self._embedded(modality, embeds)).all(-1)
        return marked

    def _embedded(self, modality: Modality, embeds: Tensor) -> Tensor:
        """The embedding of a modality's placeholders, (D,)."""
        token = torch.tensor(self.family.placeholder(modality), device=embeds.device)
        row: Tensor = self.core.get_input_embeddings()(token)
        return row.to(embeds.device)

    def _own(self, output: Any, handed: Encoded | None) -> Encoded:
        """What this patch knows of an encoder output that it is handed, or a copy of it."""
        encoded: Encoded | None = getattr(output, MARK, handed)
        if encoded is None or encoded.setup.ticket is not self.setup.ticket:
            raise UnsupportedFeatureError(
                "mm_encoder_outputs was not made by this patch, so that nothing is known "
                "of its images: pass pixel_values, or encode again on the patched model."
            )
        return encoded

    def _prompt(
        self, ids: Tensor | None, embeds: Tensor | None, mask: Tensor | None
    ) -> Prompt | None:
        if ids is not None:
            return self.family.prompt(ids, mask)
        if embeds is None or not self.family.of_prompt:
            return None
        rows = {one: self._embedded(one, embeds) for one in self.family.modalities}
        return Prompt.of_embeds(embeds, mask, rows)

    def _not_pruned(self) -> None:
        note = (
            "inputs_embeds came without pixel_values, so that visual tokens cannot be told from "
            "text: nothing was pruned. Pass visual_mask= (B, L) bool to mark them."
        )
        self._flight.unpruned = note
        if not self._warned:
            self._warned = True
            warnings.warn(note, UserWarning, stacklevel=2)

    @torch.compiler.disable
    def _after_core(self, module: nn.Module, args: Any, output: Any) -> None:
        self._flight.forget()


def _seen(cache: Any) -> Any:
    """Tokens fed into a cache so far, 0 without one."""
    return cache.get_seq_length() if cache is not None else 0
