"""ToDRE: keep visual tokens that are unlike each other, starting from the one CLS attends to most.

Reference: ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance,
    arXiv 2505.18757.
Upstream: none, no code was published.
Differs: the default rule is max-sum diversification, of the paper's second version. The k-center of
    its first, read as farthest-point selection, is `rule="k_center"`.
    Encoders without CLS start from the token with the most received attention, or from a random
    one, which the paper reports to do as well: it depends on the image's pixels alone.
    Tokens enter in positional order and newlines are dropped, which the paper leaves open.
    A token of all zeros is at a right angle to all others.
    Second stage: the paper removes all visual tokens where both the share of the text's attention
    that falls on them and the share of theirs that falls on text are below `tau`. Under a causal
    mask the second share is about 0 (only text before an image counts), so the first one decides.
    It is that of the text behind the image at the layer before the cut, the paper's 28th of 32
    counted from 1. Every image decides by its own share, also beside others in its prompt. Earlier
    layers keep what they stored of the tokens.
    Positions: those of the first stage hold for both, as the paper names none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ...batches import Greedy
from ...budget import round_tokens
from ...contract import (
    Cut,
    Features,
    ModelShape,
    PixelSeed,
    Place,
    Scope,
    Selection,
    Signal,
    TextAttention,
    VisualTokens,
)
from ...fields import check_choice, check_flag, check_fraction, check_layer
from ...layers import encoder_layer
from ...ops.dispersion import Rule, greedy_dispersion
from ...registry import register
from ...salience import salience

Pivot = Literal["cls", "received", "random"]


@register("todre")
@dataclass(frozen=True, kw_only=True)
class ToDRE(Greedy):
    """Greedy dispersion over the whole image; late in the decoder all of its tokens may go.

    `rule` says which token comes next: the one with the largest sum of distances to those before it
    ("max_sum"), or with the largest distance to the nearest of them ("k_center").
    `pivot` says where the first token comes from: attention of CLS, received attention, or chance.
    `layer` is the ViT layer whose attention is read for it; None takes the last one.
    `late` adds the second stage: behind 7/8 of the decoder's layers an image goes that gets less
    than the share `tau` of the text's attention. Without a budget a quarter of the tokens stays
    until then, as published.
    """

    needs_grid: ClassVar[bool] = True
    scopes: ClassVar[tuple[Scope, ...]] = ("image",)
    unranked: ClassVar[str | None] = (
        "picks each token by its distance to the picks before it, which is no number of the token "
        "alone"
    )
    needs_budget: ClassVar[bool] = False
    without_cls: ClassVar[Mapping[str, object]] = {"pivot": "received"}

    rule: Rule = "max_sum"
    pivot: Pivot = "cls"
    layer: int | None = None
    late: bool = True
    tau: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rule", self.rule, get_args(Rule))
        check_choice("pivot", self.pivot, get_args(Pivot))
        check_layer("layer", self.layer)
        check_flag("late", self.late)
        check_fraction("tau", self.tau)

    @property
    def places(self) -> tuple[Place, ...]:
        return (Place.BEFORE_LLM, Place.DECODER) if self.late else (Place.BEFORE_LLM,)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        late = tuple(_text_attention(shape, cut.layer) for cut in self.cuts(shape)[1:])
        if self.pivot == "random":
            return (Features(), PixelSeed(), *late)
        layer = encoder_layer(self.layer, -1, shape.tower, field="layer")
        return (Features(), salience(self.pivot, layer), *late)

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        depth = shape.decoder.num_layers
        late = Cut(Place.DECODER, min(round(7 * depth / 8), depth - 1), adaptive=True)
        first = Cut(Place.BEFORE_LLM)
        return (first, late) if self.late else (first,)

    def most(self, num_tokens: int) -> int:
        return round_tokens(0.25, num_tokens)

    def picks(self, images: Sequence[VisualTokens], count: int) -> Tensor:
        features = [tokens.signals[Features()] for tokens in images]
        first = torch.stack([self._pivot(tokens) for tokens in images])
        return greedy_dispersion(features, first, count, self.rule)

    def select_adaptive(self, tokens: VisualTokens) -> Selection:
        """The late cut: all of an image's tokens or none."""
        received = tokens.signals[_text_attention(tokens.shape, tokens.layer)].float()
        stays = bool(received.sum() >= self.tau)
        return Selection(kept=torch.arange(len(received) if stays else 0, device=received.device))

    def _pivot(self, tokens: VisualTokens) -> Tensor:
        """The first token, a scalar: of the thumbnail if there is one, else of all frames."""
        signal, tiling = tokens.signals[self.needs(tokens.shape)[1]], tokens.tiling
        first, among = 0, tokens.num_tokens
        if tiling.whole is not None:
            sizes = [tile.num_patches for tile in tiling.tiles]
            first, among = sum(sizes[: tiling.whole]), sizes[tiling.whole]
        if self.pivot == "random":
            return first + signal % among
        return first + signal[first : first + among].float().argmax()


def _text_attention(shape: ModelShape, cut: int) -> TextAttention:
    """The layer before the cut, or the last before it that has attention: what the text rows read
    from each token, on average."""
    return TextAttention(shape.decoder.attends_before(cut), rows="text")
