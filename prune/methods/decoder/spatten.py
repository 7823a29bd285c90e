"""SpAtten: layer after layer, drop the visual tokens that all layers so far attended to least.

Reference: SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head Pruning,
    HPCA 2021, arXiv 2012.09852.
Upstream: none for this algorithm. mit-han-lab/spatten, spatten_llm, holds another one: a KV cache
    of start, important and recent entries.
Differs: only visual tokens are dropped, and every image of a sample has its own ranking.
    This is the token pruning of the prompt; progressive quantisation and removing tokens while
    decoding are not part of it. Cascade pruning of heads and local pruning of values are off unless
    `heads` and `values` are given. Inferred of them: heads leave in front of the layers in which
    tokens do, their share falling by the same amount, to `heads` in the last; the magnitudes that
    count are those of the prompt's tokens; with grouped queries a key head leaves with all queries
    that read it; decoded tokens go without the same heads. `values` is the same in all layers, of
    the keys that a query sees, and what is left of its attention is not brought back to a sum of 1.
    What they save: heads, the products of attention in the prompt, for which those that stay are
    copied (of 16, half take 0.6 of the time at 2920 tokens, and no less than all at 616, on 2 cores
    of a CPU); neither projections nor entries of the cache, and nothing while decoding. Values save
    no time at all: attention of a decoded token that sorts, and gathers a quarter of them, takes
    2.5 to 5 times as long there, and that of the prompt, where every row is sorted, 25 times. Both
    show what they cost in accuracy; their speed is that of hardware built for them.
    Importance is a sum of attention as in the paper, not divided by the number of rows that see a
    token: under a causal mask late tokens receive from fewer rows, and rank lower for it.
    The ratio falls by the same amount at each cut, to the budget at the last layer. Counts are
    rounded, and those of every image follow its own size.
    Heads are averaged, which ranks as their sum does. Positions stay the original ones.
    Every layer is read in full: the sums over all rows cost more than one row of other methods.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...contract import (
    Cut,
    InDecoder,
    ModelShape,
    Place,
    Positions,
    ReceivedInLayer,
    Selection,
    Signal,
    Thinned,
    VisualTokens,
)
from ...fields import check_share
from ...ops.topk import ascending, top_k
from ...registry import register


@register("spatten")
@dataclass(frozen=True, kw_only=True)
class SpAtten(InDecoder):
    """A cut at every layer behind the first 15 %, of which there are at least three; in decoders
    where few layers have attention, behind each of these.

    `heads`: the share of key heads that the last layer goes through; those leave, for good, that
    gave least in all layers so far. `values`: the share of the keys that a query sees in a head
    whose values are read. 1.0: all.
    """

    positions: ClassVar[Positions] = "original"
    gained: ClassVar[Mapping[str, object]] = {"heads": 1.0, "values": 1.0}

    heads: float = 1.0
    values: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("heads", self.heads)
        check_share("values", self.values)

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

    def thinned(self, shape: ModelShape) -> tuple[Thinned, ...]:
        cuts = [cut.layer for cut in self.cuts(shape)]
        found = []
        for layer in shape.decoder.attending:
            done = sum(cut <= layer for cut in cuts) / len(cuts)
            one = Thinned(layer=layer, heads=1 - (1 - self.heads) * done, values=self.values)
            found += [one] if one.attention else []
        return tuple(found)

    def choose_heads(self, given: Tensor, keep: int) -> Tensor:
        return ascending(top_k(given.sum(1), keep))

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        read = [layer for layer in tokens.shape.decoder.attending if layer < tokens.layer]
        layers = [tokens.signals[ReceivedInLayer(layer)] for layer in read]
        scores = torch.stack(layers).float().sum(0)
        return Selection(kept=ascending(top_k(scores, keep)), scores=scores)
