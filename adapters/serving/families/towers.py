"""What methods read of the attention of vLLM's CLIP and SigLIP towers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from einops import rearrange
from torch import Tensor

from ....prune.contract import Signal
from ..served import OF_ATTENTION


@contextmanager
def reading(tower: Any, needs: Sequence[Signal]) -> Iterator[dict[Signal, Tensor]]:
    """What is read while the tower runs: (B, S, ...) each, CLS included."""
    layers = tower.vision_model.encoder.layers
    read: dict[Signal, Tensor] = {}
    asked: Sequence[Any] = needs  # those of attention have a layer
    with ExitStack() as hooks:
        for need in asked:
            if (reader := OF_ATTENTION.get(type(need))) is not None:
                attention = layers[need.layer].self_attn
                hook = partial(_hear, read, need, reader, attention)
                hooks.callback(attention.qkv_proj.register_forward_hook(hook).remove)
        yield read


def _hear(
    read: dict[Signal, Tensor],
    need: Signal,
    reader: Any,
    attention: Any,
    module: Any,
    args: Any,
    output: Any,
) -> None:
    heads = {"three": 3, "d": attention.head_dim}
    query, key, _ = rearrange(output[0], "b s (three h d) -> three b h s d", **heads)
    read[need] = reader(query, key, attention.scale)
