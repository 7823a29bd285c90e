"""ToDRE: keep visual tokens that are unlike each other, starting from the one CLS attends to most.

Reference: ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance,
    arXiv 2505.18757.
Upstream: none, no code was published.
Differs: this is the paper's first stage. The second one, which removes all visual tokens late in
    the decoder, is a method of another place and not part of this one.
    The default rule is max-sum diversification, of the paper's second version. The k-center of its
    first, read as farthest-point selection, is `rule="k_center"`.
    Encoders without CLS start from the token with the most received attention, or from a random
    one, which the paper reports to do as well: it depends on the image's pixels alone.
    Tokens enter in positional order and newlines are dropped, which the paper leaves open.
    A token of all zeros is at a right angle to all others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from ...contract import (
    BeforeLLM,
    Features,
    ModelShape,
    PixelSeed,
    Scope,
    Selection,
    Signal,
    VisualTokens,
)
from ...layers import encoder_layer
from ...ops.checks import check_choice, check_layer
from ...ops.dispersion import Rule, greedy_dispersion
from ...ops.parts import canvas_of
from ...ops.salience import salience
from ...ops.topk import ascending
from ...registry import register

Pivot = Literal["cls", "received", "random"]


@register("todre")
@dataclass(frozen=True, kw_only=True)
class ToDRE(BeforeLLM):
    """Greedy dispersion over the whole image.

    `pivot` says where the first token comes from: attention of CLS, received attention, or chance.
    `layer` is the ViT layer whose attention is read for it; None takes the last one.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("image",)

    rule: Rule = "max_sum"
    pivot: Pivot = "cls"
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rule", self.rule, get_args(Rule))
        check_choice("pivot", self.pivot, get_args(Pivot))
        check_layer("layer", self.layer)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        if self.pivot == "random":
            return (Features(), PixelSeed())
        layer = encoder_layer(self.layer, -1, shape.tower, field="layer")
        return (Features(), salience(self.pivot, layer))

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        features = tokens.signals[Features()]
        picks = greedy_dispersion(features, self._pivot(tokens), keep, self.rule)
        return Selection(kept=ascending(picks))

    def _pivot(self, tokens: VisualTokens) -> Tensor:
        """The first token, a scalar: of the thumbnail if there is one, else of all frames."""
        tiled = canvas_of(tokens.tiling) is not None
        among = tokens.tiling.tiles[0].num_patches if tiled else tokens.num_tokens
        signal = tokens.signals[self.needs(tokens.shape)[1]]
        return signal % among if self.pivot == "random" else signal[:among].float().argmax()
