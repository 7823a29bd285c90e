"""What a layer stored of a prompt, and every way in which methods shorten it."""

from typing import Any

import torch
from torch import Tensor
from vlmprune.prune.contract import CacheEntries, ReceivedInLayer
from vlmprune.prune.registry import method_class


def entries_of(
    keys: Tensor,
    values: Tensor,
    *,
    layer: int = 0,
    received: Tensor | None = None,
    queries: Tensor | None = None,
    visual: Tensor | None = None,
    attention: Any = None,
) -> CacheEntries:
    """What a layer stored of a prompt: keys and values (H_kv, S, D_head), the rest as needed."""
    length, width = keys.shape[1:]
    return CacheEntries(
        layer=layer,
        keys=keys,
        values=values,
        queries=keys if queries is None else queries,
        visual=torch.ones(length, dtype=torch.bool) if visual is None else visual,
        signals={} if received is None else {ReceivedInLayer(layer): received},
        attention=attention,
        hidden=torch.zeros(length, 4),
        rotary=(torch.ones(length, width), torch.zeros(length, width)),
    )


VisualPress = method_class("visual_press")
PRESSES = ("snapkv", "knorm", "received")


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(visual: str, *, heads: int = 2, group: int = 2, width: int = 4, seed: int = 0):
    """Entries of a prompt: "v" for a visual one, anything else for text."""
    length = len(visual)
    keys, values, queries = (
        seeded(h, length, width, seed=seed + i) for i, h in enumerate((heads, heads, heads * group))
    )
    return entries_of(
        keys,
        values,
        queries=queries,
        visual=torch.tensor([letter == "v" for letter in visual]),
        received=seeded(length, seed=seed + 3).abs(),
    )


COMPRESSING = [
    ("elastic_cache", {}),
    ("elastic_cache", {"start_size": 0}),
    ("elastic_cache", {"start_size": 6}),
    ("elastic_cache", {"start_size": 2}),
    ("spatten_llm", {"recent_size": 1}),
    ("spatten_llm", {"start_size": 0, "recent_size": 1}),
    *(("visual_press", {"press": press}) for press in PRESSES),
    ("visual_press", {"pooling": "max", "kernel": 7, "window": 3}),
]
