"""CATP, first stage (no released code): the gain of every token is summed anew at every step."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture


def read(picture: Picture) -> None:
    return None


def choose(picture: Picture, scores: None, keep: int) -> Tensor:
    return cover_and_align(picture.packed, picture.text, keep).sort().values


def cover_and_align(features: Tensor, text: Tensor, keep: int, weight: float = 0.7) -> Tensor:
    """Picks (keep,) among features (N, D) for text (T, D): each adds most to how well the picks
    stand for all tokens, plus `weight` times its likeness to the mean of the text."""
    unit = features / features.norm(dim=-1, keepdim=True)
    mean = text.mean(0)
    similar = (unit @ unit.T + 1) / 2
    aligned = (unit @ (mean / mean.norm()) + 1) / 2
    covered = torch.zeros(len(features))
    picks: list[int] = []
    for _ in range(keep):
        gains = (similar - covered).clamp(min=0).sum(1) + weight * aligned
        gains[picks] = -torch.inf
        picks.append(int(gains.argmax()))
        covered = torch.maximum(covered, similar[picks[-1]])
    return torch.tensor(picks)
