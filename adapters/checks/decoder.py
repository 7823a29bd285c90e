"""What cannot work on a decoder, refused when it is patched: signal by signal, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...prune.budget import MethodCall
from ...prune.contract import Attending, ModelShape, Place
from ...prune.errors import MethodFieldError, UnsupportedModelError
from ..family import Family
from .working import refused_decoder, weighs, working


def check_decoder(call: MethodCall, family: Family) -> None:
    """Refuse a decoder whose modules a method inside it or on its cache cannot read."""
    reason = refused_decoder(call.method, family)
    if reason is not None:
        inside = working(family, Place.DECODER)
        others = working(family, Place.BEFORE_LLM) + inside
        where = "before the LLM or in the decoder" if inside else "before the LLM"
        raise UnsupportedModelError(
            f"{reason} use a method that acts {where}. "
            f"Methods that work on it: {', '.join(others)}."
        )
    config: Any = family.text_model.config
    implementation = config._attn_implementation or ""
    if weighs(call.method) and ("flash" in implementation or "flex" in implementation):
        raise UnsupportedModelError(
            f"{call.name} adds numbers to attention's logits, which {implementation} does not "
            f'take: call model.set_attn_implementation("sdpa") first.'
        )
    if isinstance(call.method, Attending) and "flex" in (config._attn_implementation or ""):
        raise UnsupportedModelError(
            f"{call.name} exchanges the keys of a decoding step, which the block masks of flex "
            f'attention do not allow: call model.set_attn_implementation("sdpa") first.'
        )


def check_together(calls: Sequence[MethodCall], shape: ModelShape) -> None:
    """Refuse methods of which one takes out of the caches what another counts on."""
    on_cache = [call.name for call in calls if call.method.place is Place.CACHE]
    for call in calls if on_cache else ():
        if weighs(call.method):
            raise MethodFieldError(
                f"{call.name} adds numbers to the logits of keys, and {on_cache[0]} takes some of "
                f"these out of the cache: leave one of them out."
            )
        if any(cut.below for cut in call.method.cuts(shape)):
            raise MethodFieldError(
                f"{call.name} takes tokens out of the KV cache of the layers before its cut, which "
                f"{on_cache[0]} has shortened by then: leave one of them out."
            )
