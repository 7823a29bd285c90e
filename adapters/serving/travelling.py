"""Positions of kept tokens that travel with their embeddings, for models with M-RoPE.

vLLM numbers the tokens of a prompt before an image is encoded, so that a placeholder has no
position of its own yet: all of an image's have that of its beginning. What a row has beyond that
comes behind its features as two digits for each axis, which any float type holds exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

AXES = 3
"""Time, height and width."""
CHANNELS = 2 * AXES
_BASE = 256
"""bfloat16 holds whole numbers up to this one."""


@dataclass(frozen=True)
class Span:
    """One image in a prompt of whole images: where it begins, its tokens, how many are kept."""

    start: int
    tokens: int
    kept: int


def digits(offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers from 0 to 65535, (3, K), as channels behind features: (K, 6)."""
    return torch.cat([offsets // _BASE, offsets % _BASE]).T.to(dtype)


def offsets(channels: Tensor) -> Tensor:
    """What `digits` wrote, (K, 6), as whole numbers: (3, K) int64."""
    high, low = channels.T.long().split(AXES)
    return high * _BASE + low


def shortened(positions: Tensor, spans: Sequence[Span]) -> tuple[Tensor, int]:
    """Positions of a prompt of whole images (3, L), as those of the prompt with kept tokens alone.

    Kept tokens have the position of their image's beginning; those behind an image have their own.

    Returns:
        (3, K), and the difference between the first position behind the prompt and K.
    """
    parts, done = [], 0
    for span in spans:
        parts += [positions[:, done : span.start]]
        parts += [positions[:, span.start, None].expand(-1, span.kept)]
        done = span.start + span.tokens
    short = torch.cat([*parts, positions[:, done:]], dim=1)
    return short, int(positions.max()) + 1 - short.shape[1]
