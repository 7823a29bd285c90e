"""What a method inside the vision encoder is given in a block, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .shape import Tower
from .signals import Signal


@dataclass(frozen=True, slots=True)
class BlockCut:
    """Rows leave in an encoder block: between its attention and its MLP, or in front of it."""

    block: int
    at: Literal["mlp", "block"] = "mlp"

    @property
    def depth(self) -> tuple[int, bool]:
        """Cuts in this order are in the order in which rows pass them."""
        return self.block, self.at == "mlp"


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderRows:
    """B pictures (tiles, frames) with N rows each, where a block is cut. A row stands for patches,
    or for merge units of patches where the projector merges these. CLS and other prefix rows are
    not among them, and are never touched."""

    cut: BlockCut
    tower: Tower
    grid: tuple[int, int] | None
    """Rows and columns of the patches (or units) of each picture; None where these differ."""
    numbers: Tensor
    """(B, N) int64: the patch in raster order that each row stands for, -1 for none."""
    sizes: Tensor
    """(B, N) float32: how many patches are in each row."""
    signals: Mapping[Signal, Tensor]
    """What the method declared of this block: (B, N, ...) each."""

    @property
    def count(self) -> int:
        """N"""
        return self.numbers.shape[1]

    @property
    def device(self) -> torch.device:
        return self.numbers.device


@dataclass(frozen=True, slots=True, kw_only=True)
class Reduction:
    """Fewer rows: Y = W X, a sparse W unless `matrix` gives it whole.

    `source` alone means: these rows, as they are, in this order.
    """

    source: Tensor
    """(B, K) int64: the row before whose number and position each new row has, -1 for none."""
    owner: Tensor | None = None
    """(B, N) int64: the new row that each row goes into, -1 where it is dropped. None: each row of
    `source` into its own, all others dropped."""
    weights: Tensor | None = None
    """(B, N) of each row in its new one; None: all alike."""
    normal: bool = True
    """Whether weights are divided by their sum in the new row."""
    matrix: Tensor | None = None
    """(B, K, N) in place of `weights`, for methods that mix every row into every new one."""

    @property
    def count(self) -> int:
        """K"""
        return self.source.shape[1]

    def apply(self, rows: Tensor) -> Tensor:
        """Rows (B, N, ...) -> (B, K, ...); gradients flow through them."""
        if self.matrix is not None:
            return (self.matrix.to(rows) @ rows.flatten(2)).unflatten(2, rows.shape[2:])
        if self.owner is None:
            return take(rows, self.source)
        flat = rows.flatten(2) if rows.dim() > 2 else rows[..., None]
        mixed = self._sums(flat, self._shares().to(flat))
        return mixed.view(len(rows), self.count, *rows.shape[2:])

    def sizes(self, before: Tensor) -> Tensor:
        """Patches in each row (B, N) -> (B, K)."""
        if self.owner is None:
            return take(before, self.source)
        return self._sums(before[..., None], torch.ones_like(before))[..., 0]

    def to(self, device: torch.device) -> Reduction:
        """The same on another device."""
        if self.source.device == device:
            return self
        owner, weights, matrix = self.owner, self.weights, self.matrix
        return Reduction(
            source=self.source.to(device),
            owner=None if owner is None else owner.to(device),
            weights=None if weights is None else weights.to(device),
            normal=self.normal,
            matrix=None if matrix is None else matrix.to(device),
        )

    @classmethod
    def together(cls, parts: Sequence[Reduction]) -> Reduction:
        """Those of several pictures, with as many rows each, as one."""

        def joined(name: str) -> Any:
            found = [getattr(part, name) for part in parts]
            return None if found[0] is None else torch.cat(found)

        return cls(
            source=joined("source"),
            owner=joined("owner"),
            weights=joined("weights"),
            normal=parts[0].normal,
            matrix=joined("matrix"),
        )

    def among(self, chosen: Tensor, total: int) -> Reduction:
        """The same, where the N rows are rows `chosen` (B, N) of `total`; others are dropped."""
        source = chosen.gather(1, self.source.clamp_min(0)).where(self.source >= 0, -1)
        owner, weights, matrix = self.owner, self.weights, self.matrix
        if owner is not None:
            owner = owner.new_full((len(chosen), total), -1).scatter(1, chosen, owner)
        if weights is not None:
            weights = weights.new_zeros(len(chosen), total).scatter(1, chosen, weights)
        if matrix is not None:
            at = chosen[:, None].expand(-1, self.count, -1)
            matrix = matrix.new_zeros(len(chosen), self.count, total).scatter(2, at, matrix)
        return Reduction(
            source=source, owner=owner, weights=weights, normal=self.normal, matrix=matrix
        )

    def in_order(self, keys: Tensor) -> Reduction:
        """The same with the new rows sorted by keys (B, K)."""
        order = keys.argsort(dim=1, stable=True)
        owner, matrix = self.owner, self.matrix
        if owner is not None:
            place = order.argsort(1)
            owner = place.gather(1, owner.clamp_min(0)).where(owner >= 0, -1)
        if matrix is not None:
            matrix = take(matrix, order)
        return Reduction(
            source=self.source.gather(1, order),
            owner=owner,
            weights=self.weights,
            normal=self.normal,
            matrix=matrix,
        )

    def owners(self, count: int) -> Tensor:
        """(B, count) the new row that each of `count` rows goes into, -1 where it is dropped."""
        if self.owner is not None:
            return self.owner
        batch, kept = self.source.shape
        places = torch.arange(kept, device=self.source.device).expand(batch, -1)
        return self.source.new_full((batch, count), -1).scatter(1, self.source, places)

    def _shares(self) -> Tensor:
        """(B, N) float32 coefficients of W."""
        assert self.owner is not None  # noqa: S101  (for the types)
        weights = torch.ones_like(self.owner) if self.weights is None else self.weights
        weights = weights.float()
        if not self.normal:
            return weights
        sums = self._sums(weights[..., None], torch.ones_like(weights))[..., 0]
        return weights / sums.gather(1, self.owner.clamp_min(0))

    def _sums(self, values: Tensor, weights: Tensor) -> Tensor:
        """Weighted sums of values (B, N, C) in each new row, always in the same order: (B, K, C).

        Scattered additions would differ from run to run on a GPU.
        """
        assert self.owner is not None  # noqa: S101  (for the types)
        batch, count = self.owner.shape
        first = torch.arange(batch, device=values.device)[:, None]
        none = batch * self.count
        owner = (self.owner + first * self.count).where(self.owner >= 0, none).flatten()
        owner, row = owner.sort(stable=True)
        starts = torch.searchsorted(owner, torch.arange(none + 1, device=values.device))
        sums = embedding_bag(
            row,
            values.reshape(batch * count, -1),
            starts,
            mode="sum",
            per_sample_weights=weights.flatten()[row].to(values.dtype),
        )
        return sums[:none].view(batch, self.count, -1)


def take(values: Tensor, rows: Tensor) -> Tensor:
    """Values (B, N, ...) at rows (B, K): (B, K, ...)."""
    at = rows.view(*rows.shape, *[1] * (values.dim() - 2))
    return values.gather(1, at.expand(*rows.shape, *values.shape[2:]))
