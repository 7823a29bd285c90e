"""SpAtten: layer after layer, drop the visual tokens that all layers so far attended to least.

Reference: SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning,
    HPCA 2021, arXiv 2012.09852.
Upstream: none for this algorithm. mit-han-lab/spatten, spatten_llm, holds another one: a KV cache
    of start, important and recent entries.
Differs: only visual tokens are dropped, and every image of a sample has its own ranking.
    This is the token pruning of the prompt. Cascade pruning of heads, local pruning of values,
    progressive quantisation and pruning while decoding are not part of it.
    Importance is a sum of attention as in the paper, not divided by the number of rows that see a
    token: under a causal mask late tokens receive from fewer rows, and rank lower for it.
    The ratio falls by the same amount at each cut, to the budget at the last layer. Counts are
    rounded, and those of every image follow its own size.
    Heads are averaged, which ranks as their sum does. Positions stay the original ones.
    Every layer is read in full: the sums over all rows cost more than one row of other methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ...contract import (
    Cut,
    InDecoder,
    ModelShape,
    Place,
    Positions,
    ReceivedInLayer,
    Selection,
    Signal,
    VisualTokens,
)
from ...ops.topk import ascending, top_k
from ...registry import register


@register("spatten")
@dataclass(frozen=True, kw_only=True)
class SpAtten(InDecoder):
    """A cut at every layer behind the first 15 %, of which there are at least three; in decoders
    where few layers have attention, behind each of these."""

    positions: ClassVar[Positions] = "original"

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        last = shape.decoder.num_layers - 1
        return tuple(ReceivedInLayer(layer) for layer in shape.decoder.attending if layer < last)

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        depth = shape.decoder.num_layers
        first = min(max(3, round(0.15 * depth)), depth - 1)
        possible = [layer + 1 for layer in shape.decoder.attending if layer + 1 < depth]
        behind = [layer for layer in possible if layer >= first] or possible[-1:]
        return tuple(Cut(Place.DECODER, layer) for layer in behind)

    def counts(self, shape: ModelShape, num_tokens: int, keep: int) -> tuple[int, ...]:
        cuts = len(self.cuts(shape))
        dropped = num_tokens - keep
        return tuple(round(num_tokens - dropped * i / cuts) for i in range(1, cuts + 1))

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        read = [layer for layer in tokens.shape.decoder.attending if layer < tokens.layer]
        layers = [tokens.signals[ReceivedInLayer(layer)] for layer in read]
        scores = torch.stack(layers).float().sum(0)
        return Selection(kept=ascending(top_k(scores, keep)), scores=scores)
