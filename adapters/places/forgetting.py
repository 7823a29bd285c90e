"""Layers before a cut that store no more of the prompt than what goes on behind it"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..cache.pruned import PrunedState
from ..patch_setup import Setup
from ..sequence.layout import Layout, stored_columns
from ..sequence.masks import tells_length


def forget(
    setup: Setup,
    cache: Any,
    state: PrunedState,
    layer: int,
    stored: dict[int, Layout],
    past: Mapping[int, int],
    after: Layout,
) -> None:
    """Let the layers before `layer` store `after` of this prefill, and note it in the cache's state
    and in `stored`.

    Args:
        stored: per segment, what its layers store of this prefill.
        past: per segment, columns that they stored before it.
    """
    starts = [start for start in setup.starts if start < layer]
    told = tells_length(setup.config, cache)
    for start, end in pairwise([*starts, layer]):
        before = stored[start]
        columns = before.then(after)
        for own in cache.layers[start:end]:
            own.keys = _shortened(own.keys, past[start], columns)
            own.values = _shortened(own.values, past[start], columns)
        state.segment(start).leave(past[start], before, after, told=told)
        stored[start] = after
        if not start:
            state.uncroppable = max(0, state.uncroppable - (before.length - after.length))


def _shortened(stored: Tensor, past: int, columns: Tensor) -> Tensor:
    """Keys or values (B, H_kv, S, D_head): the first `past` columns, and of those behind them
    `columns` (B, K)."""
    new = stored_columns(stored[:, :, past:], columns.to(stored.device))
    return torch.cat([stored[:, :, :past], new], 2) if past else new
