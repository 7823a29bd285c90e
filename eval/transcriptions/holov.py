"""HoloV: chunk by chunk in Python; the similarity term is computed although it cancels out."""

from __future__ import annotations

import torch
from torch import Tensor

from .picture import Picture, canvas

MAPS = (22,)
_EPS = 1e-6


def read(picture: Picture, attention: Tensor) -> Tensor:
    """(N,): attention of CLS, tiles as they lie in the LLM's sequence."""
    rows = attention[:, :, 0, 1:].mean(1).float()
    if picture.tiles == 1:
        return rows[0]
    return torch.cat([rows[0], canvas(rows[1:], picture.grid).flatten()])


def choose(picture: Picture, scores: Tensor, keep: int) -> Tensor:
    """As many chunks as the released code sets by the budget: 16 at 64 of 576 tokens."""
    tokens = len(picture.packed)
    return spread(picture.packed, scores, max(1, int(1024 / 576 * tokens / keep)), keep)


def spread(
    features: Tensor, attention: Tensor, chunks: int, keep: int, alpha: float = 0.09
) -> Tensor:
    """Indices (keep,) of features (N, D), chunk by chunk; -1 where a chunk had too few tokens."""
    size, extra = divmod(len(features), chunks)
    bounds, start = [], 0
    for chunk in range(chunks):
        stop = start + size + (chunk < extra)
        bounds.append((start, stop))
        start = stop
    parts = [(features[a:b], attention[a:b]) for a, b in bounds]
    worth = torch.stack([chunk_score(*part, alpha) for part in parts])
    weights = worth / (worth.sum() + _EPS)
    counts = (weights * keep).floor().long()
    missing = keep - int(counts.sum())
    if missing > 0:
        counts[weights.topk(missing).indices] += 1
    kept = []
    for (start, stop), count in zip(bounds, counts.tolist(), strict=True):
        if count <= 0:
            continue
        if count >= stop - start:
            kept.append(torch.arange(start, stop))
        else:
            kept.append(start + attention[start:stop].topk(count).indices)
    found = torch.cat(kept)[:keep]
    return torch.cat([found, torch.full((keep - len(found),), -1)])


def chunk_score(features: Tensor, attention: Tensor, alpha: float) -> Tensor:
    """What a chunk is worth: its mean attention, and a variance that is divided by itself."""
    count = len(features)
    if count <= 1:
        return attention.mean()
    unit = features / (features.norm(dim=-1, keepdim=True) + _EPS)
    similar = unit @ unit.T
    similar = similar * (1 - torch.eye(count))
    mean = similar.sum(1) / (count - 1)
    variance = ((similar - mean[:, None]) ** 2).sum(1) / (count - 1)
    scaled = 1000 * attention
    balance = scaled.abs().mean() / (variance.abs().mean() + _EPS)
    return (scaled + alpha * variance * balance).mean()
