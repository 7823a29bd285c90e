"""What generate() needs beside the model's forward: one setup for all its steps, and masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.masking_utils import create_masks_for_generate
from transformers.utils import ModelOutput

from ..prune.errors import UnsupportedFeatureError
from .cache.continuation import first_padding
from .cache.pruned import pruned_state
from .cache_names import cache_given
from .checks.calls import check_generate, check_mask
from .family import Family
from .hooks import Hooks, Undo, all_of, shadow
from .patch_setup import Setup
from .places.call import InFlight
from .sequence.prompt import Prompt


class Generation:
    """Shadows what a model offers to generate with.

    Args:
        wanted: what a call that begins now runs with; None: without any method.
        prompt: makes one of token ids or embeddings, and a mask.
    """

    def __init__(
        self,
        family: Family,
        hooks: Hooks,
        flight: InFlight,
        wanted: Callable[[], Setup | None],
        prompt: Callable[[Tensor | None, Tensor | None, Tensor | None], Prompt | None],
    ) -> None:
        self._family, self._hooks, self._flight = family, hooks, flight
        self._wanted, self._prompt = wanted, prompt

    def install(self) -> Undo:
        """On the model at all times."""
        model = self._family.model
        make_masks = getattr(model, "create_masks_for_generate", create_masks_for_generate)
        undos = [
            shadow(model, "generate", self._generate),
            shadow(model, "create_masks_for_generate", self._create_masks, make_masks),
        ]
        if hasattr(model, "generate_batch"):
            undos.append(shadow(model, "generate_batch", self._refuse_batch))
        return all_of(undos)

    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if (setup := self._wanted()) is not None:
            check_generate(self._family, kwargs, inside_the_llm=setup.inside_the_llm)
        check_mask(kwargs.get("visual_mask"), kwargs.get("inputs_embeds"))
        flight = self._flight
        outer = flight.setup, flight.visual_mask, flight.chosen, flight.prompt
        standing = setup.standing if setup is not None else frozenset()
        earlier = flight.last
        self._hooks.hold(standing)
        try:
            flight.setup, flight.chosen, flight.last = setup, {}, None
            flight.visual_mask = kwargs.pop("visual_mask", None)
            ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
            embeds, cache = kwargs.get("inputs_embeds"), cache_given(kwargs)
            # What is cached already is no part of the prompt that new images stand in.
            cached = 0 if cache is None else cache.get_seq_length()
            ids = ids[:, cached:] if ids is not None and cached < ids.shape[1] else ids
            flight.prompt = self._prompt(ids, embeds, kwargs.get("attention_mask"))
            output = original(*args, **kwargs)
            if isinstance(output, ModelOutput):
                output.vlmprune_last = flight.last
            return output
        finally:
            self._hooks.release(standing)
            flight.setup, flight.visual_mask, flight.chosen, flight.prompt = outer
            flight.last = flight.last or earlier

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
        cache = cache_given(kwargs)
        state = pruned_state(cache)
        if state is not None:
            queries = kwargs["inputs_embeds"].shape[1]
            kwargs["attention_mask"] = first_padding(state, cache, queries)
            # Kinds of the prompt's tokens, which see each other both ways, are counted as it was
            # before it was shortened; new tokens are causal.
            kwargs = {k: None if k.endswith("token_type_ids") else v for k, v in kwargs.items()}
        return original(**kwargs)
