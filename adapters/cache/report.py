"""What a method on the KV cache left of a prompt's visual tokens, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..sequence.layout import by_token

Entries = Sequence[Sequence[Tensor | None]]
"""[layer][sample]."""
Rows = Mapping[int, Sequence[tuple[Tensor, Tensor]]]
"""First layer of a segment -> per image, the entries of its rows among those that the layer stored
of its prompt, and the token that each row is, -1 for none: (K,) int64 each."""


@dataclass(frozen=True, kw_only=True)
class CacheReport:
    """Computed when it is asked for, so that a call waits for nothing."""

    entries: Entries = field(repr=False)
    """The entries that stay, (K,) or (H_kv, K), none in a layer that keeps a state; None: all."""
    scores: Entries | None = field(repr=False)
    """The method's scores of entries, means over heads: (S,); None: not recorded."""
    rows: Rows = field(repr=False)
    image_sample: Sequence[int]
    tokens_in: Sequence[int]

    @property
    def num_layers(self) -> int:
        return len(self.entries)

    @property
    def kept(self) -> list[list[float]]:
        """[sample][layer]: visual entries that are left, a mean over key heads."""
        samples = len(self.entries[0])
        totals = [[0.0] * self.num_layers for _ in range(samples)]
        for image, sample in enumerate(self.image_sample):
            for layer in range(self.num_layers):
                totals[sample][layer] += float(self._of_rows(image, layer).sum())
        return [[round(total, 6) for total in layers] for layers in totals]

    def stored(self, image: int, layer: int | None = None) -> Tensor:
        """How much of each token is still stored: the share of the layer's key heads that have it;
        without a layer, the sum over layers. (N,) float32, NaN where it reached no such layer."""
        if layer is not None:
            return self._by_token(image, layer, self._of_rows(image, layer).float())
        return _over_layers([self.stored(image, each) for each in range(self.num_layers)], "sum")

    def ranked(self, image: int, layer: int | None = None) -> Tensor | None:
        """The scores of the tokens in a layer, or their mean over layers: (N,) float32, NaN where
        a token has none. None: the method ranks by none, or removed nothing."""
        if layer is None:
            layers = [self.ranked(image, each) for each in range(self.num_layers)]
            known = [scores for scores in layers if scores is not None]
            return _over_layers(known, "mean") if known else None
        of_entries = None if self.scores is None else self.scores[layer][self.image_sample[image]]
        if of_entries is None:
            return None
        own, _ = self._rows(layer)[image]
        return self._by_token(image, layer, of_entries.to(own.device)[own])

    def _of_rows(self, image: int, layer: int) -> Tensor:
        """The share of key heads that store each row (K,)."""
        own, _ = self._rows(layer)[image]
        entries = self.entries[layer][self.image_sample[image]]
        if entries is None:
            return torch.ones_like(own, dtype=torch.float64)
        heads = entries.to(own.device)
        heads = heads if heads.dim() == 2 else heads[None]
        return torch.stack([torch.isin(own, head) for head in heads]).double().mean(0)

    def _by_token(self, image: int, layer: int, values: Tensor) -> Tensor:
        _, tokens = self._rows(layer)[image]
        return by_token(values, tokens, self.tokens_in[image])

    def _rows(self, layer: int) -> Sequence[tuple[Tensor, Tensor]]:
        return self.rows[max(start for start in self.rows if start <= layer)]


def _over_layers(layers: Sequence[Tensor], how: str) -> Tensor:
    """Sum or mean over the layers that have a value."""
    values = torch.stack(list(layers))
    found = values.nansum(0) if how == "sum" else values.nanmean(0)
    return found.where(values.isfinite().any(0), torch.nan)
