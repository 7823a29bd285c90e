"""Prompts in two calls: text prefixes that are cached, then the rest."""

from __future__ import annotations

import torch
from kit import zoo
from kit.oracle import Truth
from torch import Tensor
from transformers import DynamicCache
from vlmprune.adapters.cache_names import CACHE

LONG: tuple[zoo.Row, ...] = ((9, "A", 3, "B", 4), (30, "C", 3), (8, 2))
PREFIX = (6, 25, 4)


def in_two_calls(model, case, truth: Truth, rows, prefix) -> None:
    """The prefixes of all rows, if any, then the rest; each call is padded on the left."""
    cache = DynamicCache(config=model.config.get_text_config())
    masks: list[Tensor] = []
    first = [slice(n) for n in prefix or ()]
    rest = [slice(n, None) for n in prefix or [0] * len(rows)]
    for here in (first, rest) if prefix else (rest,):
        part = [(s.ids[h], s.positions[:, h]) for s, h in zip(truth.rows, here, strict=True)]
        length = max(len(ids) for ids, _ in part)
        ids = torch.full((len(part), length), zoo.PAD)
        mask = torch.zeros(len(part), length, dtype=torch.long)
        positions = torch.zeros(len(part[0][1]), len(part), length, dtype=torch.long)
        for b, (own, at) in enumerate(part):
            ids[b, length - len(own) :] = own
            mask[b, length - len(own) :] = 1
            positions[:, b, length - len(own) :] = at
        masks.append(mask)
        extra = case.layout.extra(rows, ids) if here is rest else {}
        with torch.no_grad():
            model(
                input_ids=ids,
                attention_mask=torch.cat(masks, 1),
                position_ids=positions if len(positions) > 1 else positions[0],
                **{CACHE: cache},
                use_cache=True,
                **extra,
            )
