"""MustDrop: merge the windows of the image whose tokens are most alike, before the LLM.

Reference: Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model,
    arXiv 2411.10803.
Upstream: ModelTC/LightCompress, llmc/compression/token_reduction/mustdrop.py (conditional_pooling,
    merge, merge_wavg), a port, commit 9701d035b0aac5df97a2ebaadb30bcf0707616f5.
Differs: the first of three stages, which is all that the port holds.
    Exactly the budget stays: the last window is merged in part, its first tokens into its last
    (official: whole windows alone, so that most counts are missed by a few tokens, and CLS is one
    of the tokens counted). Below one row for each window these grow, by a row and a column at a
    time, until the budget has room for all.
    Windows at the end of a side that they do not divide are smaller (official: refused).
    In images of several tiles each one is as published for one (official: the tokens are chosen,
    and enter unmerged). Without a budget every image has its own number of windows (official:
    the least of a batch).
    Cosines are float32 and ties go to the lower index (official: the model's dtype, ties open).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import normalize

from ...batches import InOnePass, stacked
from ...contract import EncoderFeatures, ModelShape, Selection, Signal, VisualTokens
from ...errors import MethodFieldError
from ...fields import check_fraction
from ...ops.merge import bags
from ...ops.parts import on_device
from ...ops.windows import of_size
from ...registry import register


@register("mustdrop")
@dataclass(frozen=True, kw_only=True)
class MustDrop(InOnePass):
    """Windows of `window` rows and columns become the mean of their tokens, most alike first.

    Merged rows come first, the untouched tokens behind them. Without a budget all windows merge
    whose mean cosine is `threshold` or more.
    """

    needs_grid: ClassVar[bool] = True
    needs_budget: ClassVar[bool] = False
    finds_count: ClassVar[bool] = True
    unranked: ClassVar[str | None] = "ranks windows, not tokens"

    window: tuple[int, int] = (3, 3)
    threshold: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fraction("threshold", self.threshold)
        if not _is_window(self.window):
            raise MethodFieldError(
                f"window={self.window!r} is not possible: give rows and columns, at least 2 tokens "
                f"in all, e.g. (3, 3)."
            )

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (EncoderFeatures(),)

    def kind(self, tokens: VisualTokens) -> Hashable:
        return tokens.grid

    def select_equal(self, images: Sequence[VisualTokens], keep: int) -> list[Selection]:
        features, grid = stacked(images, EncoderFeatures()), images[0].grid
        windows = _windows(grid, self._window(grid, keep), features.device)
        return _merged(features, windows, _alike(features, windows), keep)

    def select_adaptive(self, tokens: VisualTokens) -> Selection:
        features = tokens.signals[EncoderFeatures()][None]
        windows = _windows(tokens.grid, self.window, features.device)
        likeness = _alike(features, windows)
        gone = (windows >= 0).sum(1) - 1
        keep = tokens.num_tokens - int((gone * (likeness[0] >= self.threshold)).sum())
        return _merged(features, windows, likeness, keep)[0]

    def _window(self, grid: tuple[int, int], keep: int) -> tuple[int, int]:
        """The size of windows, of which there are `keep` at most."""
        rows, columns = self.window
        while -(-grid[0] // rows) * -(-grid[1] // columns) > keep:
            rows, columns = rows + 1, columns + 1
        return rows, columns


def _is_window(value: Any) -> bool:
    pair = isinstance(value, tuple) and len(value) == 2
    whole = pair and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    return whole and min(value) >= 1 and max(value) >= 2


def _windows(grid: tuple[int, int], size: tuple[int, int], device: torch.device) -> Tensor:
    """(W, s) int64, -1 in front of the tokens of smaller ones."""
    found = of_size(grid, size)
    return on_device([number for window in found for number in window], device).view(len(found), -1)


def _alike(features: Tensor, windows: Tensor) -> Tensor:
    """Mean cosine of different tokens in each window (W, s): (B, W); -inf where there is one."""
    there = windows >= 0
    unit = normalize(features.float(), dim=-1)[:, windows.clamp_min(0)] * there[..., None]
    count = there.sum(1)
    pairs = unit.sum(2).square().sum(-1) - unit.square().sum((2, 3))
    return (pairs / (count * (count - 1)).clamp_min(1)).masked_fill(count < 2, -torch.inf)


def _merged(features: Tensor, windows: Tensor, likeness: Tensor, keep: int) -> list[Selection]:
    """Windows (W, s) merged by falling likeness (B, W), each into its last token, until `keep` rows
    are left: of features (B, N, C)."""
    images, num_tokens = features.shape[:2]
    best = likeness.sort(dim=1, descending=True, stable=True).indices
    ranked = windows[best]
    inner, last = ranked[..., :-1].flatten(1), ranked[..., -1]
    there = inner >= 0
    leaves = there & (there.cumsum(1) <= num_tokens - keep)

    own = torch.arange(num_tokens, device=features.device).expand(images, -1)
    into = last.repeat_interleave(windows.shape[1] - 1, 1)
    spare = torch.cat([own, own[:, :1]], 1)  # its last column takes what stays
    owner = spare.scatter(1, inner.masked_fill(~leaves, num_tokens), into)[:, :num_tokens]
    kept = (owner != own).to(torch.uint8).argsort(dim=1, stable=True)[:, :keep]

    # Merged rows by rank, then the others by number.
    rank = torch.arange(last.shape[1], device=features.device).expand_as(last)
    merged = leaves.view(images, -1, windows.shape[1] - 1).any(2)
    behind = own + last.shape[1]
    key = behind.scatter(1, last, torch.where(merged, rank, behind.gather(1, last)))
    order = kept.gather(1, key.gather(1, kept).argsort(dim=1))

    place = torch.empty_like(own).scatter(1, order, own[:, :keep])
    row, members = place.gather(1, owner).sort(dim=1, stable=True)
    image = torch.arange(images, device=features.device)[:, None] * num_tokens
    starts = torch.searchsorted(row, own[:, :keep].contiguous())
    means = bags(
        rearrange(features, "b n c -> (b n) c"),
        (members + image).flatten(),
        (starts + image).flatten(),
    )
    groups = torch.stack([row, members], 1)
    return [
        Selection(kept=kept[i], order=order[i], features=rows, groups=groups[i])
        for i, rows in enumerate(means.view(images, keep, -1))
    ]
