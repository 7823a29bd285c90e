"""Every feature of `forward` and `generate`, and at which places it is refused."""

from __future__ import annotations

from kit.feature_bench import PLACES, Features
from kit.features_of_caches import CACHES
from kit.features_of_forward import FORWARD
from kit.features_of_generate import GENERATE

FEATURES: Features = {**GENERATE, **CACHES, **FORWARD}
CACHE = {"on the cache", "all"}
INSIDE = {"in the decoder", *CACHE}
REFUSED: dict[str, tuple[set[str], str]] = {
    "prefill in chunks": (set(PLACES), "prefill_chunk_size"),
    "continuous batching": (set(PLACES), "generate_batch"),
    "4-D attention mask": (set(PLACES), "4-D"),
    "prompt lookup decoding": (INSIDE, "prompt_lookup_num_tokens"),
    "assistant model": (INSIDE, "assistant_model"),
    "use_cache=False": (CACHE, "use_cache=False"),
    "static cache": (CACHE, "cache_implementation"),
    "second turn with a new image": (CACHE, "new image"),
    "merged inputs_embeds with visual_mask=": ({"in the encoder"}, "has run already"),
}
"""Features that are refused, at which places, and a word that the message holds."""
SLOW = {"torch.compile"}
"""Features that are run with all cuts at once only, and not on every place."""


def is_refused(name: str, place: str) -> bool:
    return place in REFUSED.get(name, ((), ""))[0]


def found() -> dict[str, dict[str, str]]:
    words = {True: "refused", False: "works"}
    return {name: {p: words[is_refused(name, p)] for p in PLACES} for name in FEATURES}
