"""IVC-Prune: keep tokens whose rotary angles stand out, and those whose values are near the text's.

Reference: IVC-Prune: Revealing the Implicit Visual Coordinates in LVLMs for Vision Token Pruning,
    ICLR 2026, arXiv 2602.03060.
Upstream: FireRedTeam/IVC-Prune, transformers/src/transformers/models/qwen2_5_vl/
    modeling_qwen2_5_vl.py and .../llama/modeling_llama.py (IVCP_forward_flashattention),
    commit 03afd9cee41f60bb30b51a4105839f2b5d467814.
Differs: the counts of coordinates and seeds, which are shares of the image in the code, follow the
    budget, so that they fit into it; at the published half of the tokens they are the same.
    Of the two rules the code has one for each family of models; here `rule` chooses.
    Every image of a sample has its own choice, from its own tokens and the text behind it, the
    first two tokens of which are skipped where more follow (official: the first image).
    The softmax of `rule="union"` is over the image and all of the prompt's text; other images are
    not in it.
    Published for layer 16 of 32 (and 2, 16 or 22 of 28 and 36); other depths scale from the first.
    Means of the tables over several axes tie exactly and go to the lower index (official: open).
    Scores are float32 (official: the model's dtype).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from einops import rearrange
from torch import Tensor

from ...amount import Budget
from ...budget import round_tokens
from ...contract import (
    Cut,
    InDecoder,
    LayerValues,
    ModelShape,
    Place,
    Positions,
    RotaryMeans,
    Selection,
    Signal,
    TextValues,
    VisualTokens,
)
from ...errors import BudgetError
from ...fields import check_choice, check_layer
from ...layers import cut_behind_attention, scale_layer
from ...ops.topk import ascending, top_k
from ...registry import register

Rule = Literal["quota", "union"]
_LAYER, _DEPTH, _SKIPPED = 16, 32, 2
_HINT = "give the first decoder layer that sees fewer tokens, at least 1 (16 of 32 is published)"


@register("ivc_prune")
@dataclass(frozen=True, kw_only=True)
class IVCPrune(InDecoder):
    """One cut, at which the layers before it forget the tokens, too. `layer` is the first decoder
    layer that sees fewer; None takes the published 16 of 32. Values are of the layer before it.

    `rule`: "quota" keeps coordinates and seeds and fills up with the tokens nearest to text and
    seeds, without a budget to half of the tokens; "union" keeps coordinates, seeds and a fifth of
    the tokens, whatever number these are together (0.2 to 0.31 of all), and takes no budget.
    """

    positions: ClassVar[Positions] = "original"
    needs_budget: ClassVar[bool] = False

    layer: int | None = None
    rule: Rule = "quota"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("layer", self.layer)
        check_choice("rule", self.rule, get_args(Rule))

    def check_budget(self, budget: Budget | None) -> None:
        super().check_budget(budget)
        if budget is not None and self.rule == "union":
            raise BudgetError(
                f"{self.name} cannot reach {budget} with rule='union', which finds its own number "
                f"of tokens: leave the budget out, or use rule='quota'."
            )

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        read = shape.decoder.attends_before(self.cuts(shape)[0].layer)
        own = (LayerValues(read), TextValues(read), RotaryMeans(read))
        return own if self.rule == "quota" else (*own, TextValues(read, part="all"))

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        depth = shape.decoder.num_layers
        own = scale_layer(_LAYER, depth_published=_DEPTH, depth=depth)
        layer = own if self.layer is None else self.layer
        layer = cut_behind_attention(layer, shape, "ivc_prune", _HINT)
        return (Cut(Place.DECODER, layer, adaptive=self.rule == "union", below=True),)

    def most(self, num_tokens: int) -> int:
        return round_tokens(0.5, num_tokens)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        values, text, angles = (tokens.signals[need] for need in self.needs(tokens.shape))
        scores, seeds = _relevance(values, text, values, max(1, round(0.02 * keep)))
        first = torch.cat([seeds, *_coordinates(angles, round(0.2 * keep))])
        ranked = scores.index_fill(0, first, torch.inf)
        return Selection(kept=ascending(top_k(ranked, keep)), scores=scores)

    def select_adaptive(self, tokens: VisualTokens) -> Selection:
        values, text, angles, all_text = (tokens.signals[n] for n in self.needs(tokens.shape))
        count = len(values)
        seen = torch.cat([values, all_text])
        scores, seeds = _relevance(values, text, seen, max(1, round(0.01 * count)))
        near = top_k(scores, round(0.2 * count))
        found = torch.cat([near, seeds, *_coordinates(angles, round(0.05 * count))])
        return Selection(kept=found.unique(), scores=scores)


def _coordinates(angles: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` tokens of the largest mean cosine, and those of the largest mean sine."""
    cosines, sines = angles.unbind(1)
    return top_k(cosines, count), top_k(sines, count)


def _relevance(values: Tensor, text: Tensor, seen: Tensor, seeds: int) -> tuple[Tensor, Tensor]:
    """How near each token is to the text and to seeds, (N,), and the seeds: the tokens nearest to
    the text alone.

    Args:
        values: (N, H_kv, D_head); `text` (T, ...) behind the image.
        seen: (S, ...): what a row's attention is shared among, the N tokens first.
    """
    keys = rearrange(seen.float(), "s h d -> h d s")
    asked = text[_SKIPPED:] if len(text) > _SKIPPED else text[-1:]

    def near(rows: Tensor) -> Tensor:
        """(R, N)"""
        logits = rearrange(rows.float(), "r h d -> h r d") @ keys * rows.shape[-1] ** -0.5
        return logits.softmax(-1).mean(0)[:, : len(values)]

    of_text = near(asked)
    found = top_k(of_text.mean(0), seeds)
    return torch.cat([of_text, near(values[found])]).mean(0), found
