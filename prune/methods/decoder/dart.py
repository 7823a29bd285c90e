"""DART: pick a few pivots by the norm of their keys, and the visual tokens least like each of them.

Reference: Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters
    More, EMNLP 2025, arXiv 2502.11494.
Upstream: ZichenWen1/DART as copied in Chenfei-Liao/VTC-Bench, external/DART/llava/model/
    language_model/modeling_llama_self.py (DART.get_retained_image_token),
    commit 983e443ebb41fac8db19829499fe388c87885b58.
Differs: pivots take turns in one order, image pivots and then text pivots, each by falling norm
    (official: in the order of a Python set of their absolute positions, so that the same image
    behind a longer system prompt gets other tokens).
    Exactly the budget stays: what eight equal quotas leave over goes to the first turns, one token
    each (official: quotas are rounded down, and the image pivots come on top of the budget). A
    budget below the pivots keeps the first of these; a text of fewer tokens has fewer pivots.
    Every image of a sample has its own pivots; those of text are behind it, up to the prompt's end.
    As published, cosines are those of hidden states behind the LLM's last norm, weights included.
    Norms and cosines are float32 and ties go to the lower index (official: the model's dtype).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ...contract import (
    Cut,
    Hidden,
    InDecoder,
    LayerKeys,
    ModelShape,
    Place,
    Positions,
    Selection,
    Signal,
    TextHidden,
    TextKeys,
    VisualTokens,
)
from ...errors import MethodFieldError
from ...fields import check_int
from ...layers import cut_behind_attention
from ...ops.topk import ascending, top_k
from ...registry import register

_HINT = "give the first decoder layer that sees fewer tokens, at least 1 (2 is published)"


@register("dart")
@dataclass(frozen=True, kw_only=True)
class DART(InDecoder):
    """One cut: `layer` is the first decoder layer that sees fewer tokens, on any depth.

    Keys are of the last layer before it that has attention; where none has, the cut is behind the
    first that has. `pivot_image` and `pivot_text` are the numbers of pivots among the image's
    tokens and the text.
    """

    positions: ClassVar[Positions] = "original"
    unranked: ClassVar[str | None] = (
        "lets pivots take tokens by turns, so that no number of a token alone decides"
    )

    layer: int = 2
    pivot_image: int = 4
    pivot_text: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("layer", self.layer, hint=_HINT)
        if self.layer == 0:
            raise MethodFieldError(f"layer=0 is not possible: {_HINT}.")
        check_int("pivot_image", self.pivot_image, at_least=1, hint="give a count, at least 1")
        check_int("pivot_text", self.pivot_text, at_least=0, hint="give a count, 0 or more")

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        layer = self.cuts(shape)[0].layer
        read = shape.decoder.attends_before(layer)
        hidden = (Hidden(layer, normed=True), TextHidden(layer, normed=True))
        return (LayerKeys(read), TextKeys(read), *hidden)

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        return (Cut(Place.DECODER, cut_behind_attention(self.layer, shape, "dart", _HINT)),)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        keys, text_keys, hidden, text = (tokens.signals[need] for need in self.needs(tokens.shape))
        of_image = _largest(keys, min(self.pivot_image, keep))
        of_text = _largest(text_keys, min(self.pivot_text, len(text_keys)))
        unit = normalize(hidden.float(), dim=-1)
        pivots = torch.cat([unit[of_image], normalize(text[of_text].float(), dim=-1)])
        order = self.turns(of_image, of_text)
        pivots = pivots if order is None else pivots[order]
        taken = _taken(pivots @ unit.T, of_image, keep - len(of_image))
        return Selection(kept=ascending(torch.cat([of_image, *taken])))

    def turns(self, of_image: Tensor, of_text: Tensor) -> Tensor | None:
        """The order in which pivots take tokens, numbers among both together; None: as given, by
        falling norm, those of the image first."""
        return None


def _largest(keys: Tensor, count: int) -> Tensor:
    """The `count` tokens of the largest keys (n, H, D_head), by their L1 norm over all heads."""
    return top_k(keys.float().flatten(1).abs().sum(1), count)


def _taken(cosines: Tensor, gone: Tensor, count: int) -> list[Tensor]:
    """What pivots take by turns, `count` tokens in all: of those left, the least like each.

    Args:
        cosines: (P, N) of pivots, in the order of turns, and tokens.
        gone: tokens that are not there to be taken.
    """
    quota, more = divmod(count, len(cosines))
    found = []
    left = -cosines.index_fill(1, gone, torch.inf)
    for turn in range(len(cosines)):
        taken = top_k(left[turn], quota + (turn < more))
        left.index_fill_(1, taken, -torch.inf)
        found.append(taken)
    return found
