"""CATP: keep the tokens that together stand for all of the image, and are close to its text.

Reference: CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal
    In-Context Learning, AAAI 2026, arXiv 2508.07871.
Upstream: none, no code was published.
Differs: an image without any text is chosen for by coverage alone.
    Tokens enter in positional order and newlines are dropped, which the paper leaves open.
    A token of all zeros is half like every other, as is a text whose embeddings cancel.
    Second stage, where the paper leaves open: its layers count from 0, and hidden states are the
    outputs of layer K (context) and K + 1 (query), on which the cut follows at once. The context is
    everything before the prompt's last image, text included; the query is that image and the rest
    of the prompt. Attention is the prompt's last row, averaged over heads. All images of the
    context are ranked together, and as many of their tokens stay as the budget gives them in sum.
    A prompt of one image has no context to cut: its tokens are compared with the prompt's text.
    Likeness in the decoder is the plain cosine (before the LLM it is moved to 0..1).
    Half of what is to go (rounded up) goes before the LLM, with newlines among them as their policy
    says; those that stay compete with patches in the decoder.
    Positions: those of the first stage hold for all, as the paper names none.
    Published for decoders of 28 and 32 layers (K = 6, kept up to 36) and of 40 (K = 10).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from ...contract import (
    BeforeLLM,
    Cut,
    Features,
    Hidden,
    MeanHidden,
    ModelShape,
    Place,
    Scope,
    Selection,
    Signal,
    TextAttention,
    TextEmbeddings,
    VisualTokens,
)
from ...errors import MethodFieldError, UnsupportedModelError
from ...fields import check_flag, check_layer, check_number
from ...layers import scale_layer, user_layer
from ...ops.facility import greedy_cover
from ...ops.topk import ascending, top_k
from ...registry import register


@register("catp")
@dataclass(frozen=True, kw_only=True)
class CATP(BeforeLLM):
    """Greedy facility location, plus `alignment` times the likeness to the mean of the text.

    `late` leaves the other half of the cuts to the decoder, behind its layer `layer` (the paper's
    K; None takes its own) and the next: of all images but the prompt's last, tokens stay that the
    last row attends to more and more, plus `similarity` times their likeness to the query; then, of
    the last image, those that are like the context.
    """

    scopes: ClassVar[tuple[Scope, ...]] = ("image", "tile")
    waits: ClassVar[str | None] = (
        "before the LLM a CPU reads the rows that changed alone, a GPU all up to STORE_UP_TO"
    )
    unranked: ClassVar[str | None] = (
        "picks tokens before the LLM by what each adds to the picks before it, which is no number "
        "of the token alone"
    )

    alignment: float = 0.7
    similarity: float = 0.6
    layer: int | None = None
    late: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alignment", self.alignment)
        check_number("similarity", self.similarity)
        check_layer("layer", self.layer)
        check_flag("late", self.late)

    @property
    def places(self) -> tuple[Place, ...]:
        return (Place.BEFORE_LLM, Place.DECODER) if self.late else (Place.BEFORE_LLM,)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        before = (Features(), TextEmbeddings())
        if not self.late:
            return before
        layer = self._layer(shape)
        return (*before, *_of_context(layer + 1), *_of_query(layer + 2))

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        first = Cut(Place.BEFORE_LLM)
        if not self.late:
            return (first,)
        layer = self._layer(shape)
        context = Cut(Place.DECODER, layer + 1, images="context")
        return (first, context, Cut(Place.DECODER, layer + 2, images="query"))

    def counts(self, shape: ModelShape, num_tokens: int, keep: int) -> tuple[int, ...]:
        return ((num_tokens + keep) // 2, keep, keep) if self.late else (keep,)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        if tokens.place is Place.BEFORE_LLM:
            return self._stage_1(tokens, keep)
        layer = self._layer(tokens.shape)
        score = self._in_context if tokens.layer == layer + 1 else self._in_query
        scores = score(tokens)
        return Selection(kept=ascending(top_k(scores, keep)), scores=scores)

    def _stage_1(self, tokens: VisualTokens, keep: int) -> Selection:
        features, text = (tokens.signals[signal] for signal in (Features(), TextEmbeddings()))
        unit = normalize(features.float(), dim=-1)
        bonus = self.alignment * _aligned(unit, text.float())
        return Selection(kept=ascending(greedy_cover(unit, bonus, keep)))

    def _in_context(self, tokens: VisualTokens) -> Tensor:
        before, after, hidden, query = (tokens.signals[s] for s in _of_context(tokens.layer))
        return (after - before).clamp_min(0) + self.similarity * _cosine(hidden, query)

    def _in_query(self, tokens: VisualTokens) -> Tensor:
        hidden, context = (tokens.signals[signal] for signal in _of_query(tokens.layer))
        return _cosine(hidden, context)

    def _layer(self, shape: ModelShape) -> int:
        """K: the last decoder layer that sees all of the context's tokens."""
        depth = shape.decoder.num_layers
        last = depth - 3  # two layers follow, each the first to see fewer of some tokens
        if last < 1:
            raise UnsupportedModelError(
                f"catp cuts in the decoder from layer 2 on, at two layers, and this decoder has "
                f"{depth}: use late=False."
            )
        if self.layer is None:
            return min(_published_layer(depth), last)
        layer = user_layer(self.layer, depth=depth, field="layer")
        if not 1 <= layer <= last:
            raise MethodFieldError(
                f"layer={self.layer} is not possible in a decoder of {depth} layers: the layer "
                f"before it is read, and the two behind it are cut. Use 1..{last}."
            )
        return layer


def _published_layer(depth: int) -> int:
    if 28 <= depth <= 36:
        return 6
    deep = depth > 36
    return scale_layer(10 if deep else 6, depth_published=40 if deep else 32, depth=depth)


def _of_context(cut: int) -> tuple[Signal, ...]:
    """What the cut of the context at this layer reads."""
    attention = (TextAttention(layer, rows="last") for layer in (cut - 2, cut - 1))
    return (*attention, Hidden(cut), MeanHidden(cut, "query"))


def _of_query(cut: int) -> tuple[Signal, ...]:
    """What the cut of the prompt's last image at this layer reads."""
    return (Hidden(cut), MeanHidden(cut, "context"))


def _cosine(hidden: Tensor, mean: Tensor) -> Tensor:
    """Cosine of hidden states (N, D) with a mean (D,): (N,), 0 where either is all zeros."""
    return cosine_similarity(hidden.float(), mean.float(), dim=-1)


def _aligned(unit: Tensor, text: Tensor) -> Tensor:
    """Cosine of tokens (N, D) with the mean of text (T, D), moved to 0..1; 0 without text: (N,)."""
    if not len(text):
        return unit.new_zeros(len(unit))
    return (unit @ normalize(text.mean(0), dim=0) + 1) / 2
