"""What cannot be combined with pruning, refused at the call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...prune.contract import Place
from ...prune.errors import UnsupportedFeatureError
from ..encoded import Encoded
from ..family import Family
from ..patch_setup import Setup


def check_generate(family: Family, kwargs: Mapping[str, Any], *, inside_the_llm: bool) -> None:
    """Refuse what would give wrong results.

    Args:
        inside_the_llm: a method acts in the decoder or on its cache.

    Raises:
        UnsupportedFeatureError: with the option and what to do instead.
    """
    config = kwargs.get("generation_config") or getattr(family.model, "generation_config", None)

    def option(name: str) -> Any:
        value = kwargs.get(name)
        return value if value is not None else getattr(config, name, None)

    if option("prefill_chunk_size") is not None:
        raise UnsupportedFeatureError(
            f"prefill_chunk_size={option('prefill_chunk_size')} splits the prompt, and a method "
            f"would see only a part of the image: leave it out (a pruned prompt is short)."
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and getattr(mask, "ndim", None) != 2:
        raise UnsupportedFeatureError(
            "A custom attention mask that is not 2-D cannot be shortened with the visual tokens: "
            "pass the (B, L) padding mask of the processor, or unpatch the model."
        )
    copies = max(option("num_beams") or 1, option("num_return_sequences") or 1)
    family.check_generate(kwargs, copies)
    if not inside_the_llm:
        return
    if kwargs.get("assistant_model") is not None or option("prompt_lookup_num_tokens") is not None:
        raise UnsupportedFeatureError(
            "Assisted decoding feeds draft tokens together with the prompt, and a method inside "
            "the decoder or on its cache would choose by the drafts instead of the question: leave "
            "out assistant_model / prompt_lookup_num_tokens, or use a method that acts before the "
            "LLM."
        )


def refuse_checkpointing(text: Any, encoded: Iterable[Encoded]) -> None:
    """Refuse cuts in the decoder where its layers run a second time.

    Args:
        text: the text model.
    """
    stages = (stage for of_call in encoded for image in of_call.images for stage in image.plan)
    in_decoder = any(stage.place is Place.DECODER for stage in stages)
    if in_decoder and text.training and text.gradient_checkpointing:
        raise UnsupportedFeatureError(
            "Pruning inside the decoder cannot be combined with gradient checkpointing, which "
            "runs layers a second time: call model.activation_checkpointing_disable() or "
            "model.eval(), or use a method that acts before the LLM."
        )


def refuse_cache(setup: Setup, cache: Any, *, shortened: bool) -> None:
    """Refuse caches that a method on the cache cannot work with; `shortened`: it has worked on this
    one before."""
    call = setup.on_cache
    if call is None:
        return
    if setup.text.training and setup.text.gradient_checkpointing:
        raise UnsupportedFeatureError(
            f"{call.name} acts on the KV cache, and gradient checkpointing keeps none: call "
            f"model.activation_checkpointing_disable() or model.eval(), or use a method that acts "
            f"before the LLM."
        )
    if cache is None:
        raise UnsupportedFeatureError(
            f"{call.name} acts on the KV cache, and use_cache=False keeps none: leave that out, or "
            f"use a method that acts before the LLM or in the decoder."
        )
    if shortened:
        raise UnsupportedFeatureError(
            f"{call.name} works on the cache of one prompt, and this one held an earlier image: "
            f"start a new cache for a new image, or ask on in text alone."
        )
    attending = setup.shape.decoder.attending  # others keep states, which are left alone
    _refuse_fixed(call.name, [cache.layers[layer] for layer in attending])


def refuse_forgetting(name: str, cache: Any, *, generating: bool) -> None:
    """Refuse what a cut cannot work with at which the layers before it forget tokens, too.

    Args:
        name: of the method.
        generating: whether further tokens follow, in the same generate().
    """
    if cache is not None:
        _refuse_fixed(name, cache.layers)
    elif generating:
        raise UnsupportedFeatureError(
            f"{name} takes tokens out of the KV cache of the layers before its cut, and "
            f"use_cache=False keeps none: leave that out, or use another method in the decoder."
        )


def refuse_thinned(setup: Setup, cache: Any, counts: tuple[int, int], *, generating: bool) -> None:
    """Refuse prompts behind which no decoding with some of the neurons or heads is possible.

    Args:
        counts: rows of the batch with images, and all.
        generating: whether further tokens follow, in the same generate().
    """
    if setup.thinning is None:
        return
    shown, rows = counts
    name, what = setup.thinning.name, "neurons" if setup.with_core else "heads"
    if rows > 1 and setup.with_core:
        raise UnsupportedFeatureError(
            f"{name} decodes with neurons that one prompt chose, and this batch has {rows} rows "
            f"(beams and returned sequences count): a step would read other weights for each. Give "
            f"one prompt at a time, or leave neurons out."
        )
    if shown < rows:
        raise UnsupportedFeatureError(
            f"{name} leaves out heads, values or neurons for prompts with images, and "
            f"{rows - shown} of the {rows} rows of this batch have none: give them in a call of "
            f"their own."
        )
    if cache is None and generating and (setup.with_core or setup.last_heads):
        raise UnsupportedFeatureError(
            f"{name} decodes with {what} that the prompt chose, and with use_cache=False every "
            f"step is a prompt again: leave that out, or leave {what} out."
        )


def _refuse_fixed(name: str, layers: Sequence[Any]) -> None:
    """Refuse a cache whose layers do not let entries go."""
    kinds = {type(layer).__name__ for layer in layers}
    if kinds - {"DynamicLayer"}:
        raise UnsupportedFeatureError(
            f"{name} takes entries out of the KV cache, which {', '.join(sorted(kinds))} "
            f"does not allow: leave cache_implementation out, so that a DynamicCache is used."
        )


def check_mask(visual_mask: Any, embeds: Any) -> None:
    """Refuse `visual_mask=` without the embeddings whose visual tokens it marks."""
    if visual_mask is not None and embeds is None:
        raise UnsupportedFeatureError(
            "visual_mask= marks visual tokens inside inputs_embeds, and none were given: leave it "
            "out, input_ids and pixel_values tell by themselves."
        )
