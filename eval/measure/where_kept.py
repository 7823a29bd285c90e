"""Where in pictures tokens were kept, over all questions of a cell, and whether the evidence, the
patches that a question is about, was among them.

Both are read on a raster of `SIDE` x `SIDE` points of what the model sees of a picture; a point is
kept where a token over it has its own place in the prompt, in the thumbnail or on the canvas of
tiles. Where it is not known how crops lie on the picture, the thumbnail alone is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from ...adapters.report import Last
from ...prune.tiling import Tiling
from ..results.records import EvidenceKept, Measured, WhereKept

SIDE = 14
"""Points of the raster on each side; the embedded benchmark has as many patches."""


@dataclass
class Seen:
    """What one process saw kept."""

    counts: Tensor = field(default_factory=lambda: torch.zeros(SIDE, SIDE, dtype=torch.int64))
    images: int = 0
    evidence: list[float | None] = field(default_factory=list)
    """Per answered question, the share of its evidence that was kept; None: it is not known."""

    def note(self, last: Last, sample: int, evidence: Sequence[int] | None = None) -> None:
        """A question that was answered. What a method on the cache left differs from layer to
        layer, and is not looked at.

        Args:
            sample: its number in the batch.
            evidence: points of the raster that its one image's answer needs, in reading order.
        """
        if last.cache_kept is not None:
            self.evidence.append(None)
            return
        rasters = [
            raster(tiling, kept)
            for tiling, kept, of in zip(last.tilings, last.kept, last.image_sample, strict=True)
            if of == sample
        ]
        for points in rasters:
            self.counts += points
            self.images += 1
        found: float | None = None
        if evidence and len(rasters) == 1:
            found = rasters[0].flatten()[list(evidence)].double().mean().item()
        self.evidence.append(found)


def raster(tiling: Tiling, kept: Tensor) -> Tensor:
    """Which points of the raster have a kept token over them: (SIDE, SIDE) bool.

    Args:
        kept: (K,) numbers of tokens.
    """
    alive = torch.zeros(tiling.num_tokens, dtype=torch.bool)
    alive[kept.cpu()] = True
    patches = alive[tiling.patches(torch.device("cpu"))]
    found = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    middles = (torch.arange(SIDE) + 0.5) / SIDE
    start = 0
    for number, block in enumerate(tiling.blocks):
        grid = patches[start : start + block.num_patches].view(block.rows, block.columns)
        start += block.num_patches
        if block.num_patches and tiling.thumbnail in (None, number):
            rows, columns = (middles * block.rows).long(), (middles * block.columns).long()
            found |= grid[rows][:, columns]
    return found


def add_where(
    cell: Measured,
    seen: Sequence[Seen],
    evidence: Sequence[float | None],
    scores: Sequence[float | None],
) -> None:
    """What the processes saw, as far as it is known, in what running a cell yields.

    Args:
        evidence, scores: of all questions, in order.
    """
    if (where := _where(seen)) is not None:
        cell["where"] = where
    if (found := _evidence(evidence, scores)) is not None:
        cell["evidence"] = found


def _where(seen: Sequence[Seen]) -> WhereKept | None:
    """Percent of images in which each point was kept; None without images."""
    images = sum(one.images for one in seen)
    if not images:
        return None
    counts = torch.stack([one.counts for one in seen]).sum(0)
    percent = (100 * counts / images).round().int().flatten().tolist()
    return WhereKept(side=SIDE, images=images, percent=percent)


def _evidence(
    shares: Sequence[float | None], scores: Sequence[float | None]
) -> EvidenceKept | None:
    """Means over questions whose evidence is known, and over those answered right and wrong."""
    known = [
        (share, score) for share, score in zip(shares, scores, strict=True) if share is not None
    ]
    if not known:
        return None
    right, wrong = ([share for share, score in known if score == value] for value in (1, 0))
    return EvidenceKept(
        mean=fmean(share for share, _ in known),
        right=fmean(right) if right else None,
        wrong=fmean(wrong) if wrong else None,
        questions=len(known),
    )
