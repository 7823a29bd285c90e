"""TransPrune: keep the visual tokens that some layers change most and that the text reads next.

Reference: TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model,
    CVPR 2026, arXiv 2507.20630.
Upstream: liaolea/TransPrune, llava/model/modeling_llama_transprune.py
    (LlamaModel.transprune_rank_drop, LlamaDecoderLayer_TransPrune.compute_transf_weight),
    commit c9e8284f5808f7692c40590ffc99537e9220a01d.
Differs: from the paper as the released code does. The angle counts as 1 - cos, its weights are
    normalised over the whole prompt, and both scores by their sums, of equal weight (paper:
    1 - |cos|, image tokens only, a weighted mean of scores that are not normalised).
    From the code: the last cut's count is rounded, and those before are its multiples (official:
    each ratio of all tokens, truncated). Every image has its own ranking and every prompt its own
    weights (official: one prompt of one image). Scores are float32 and ties go to the lower index
    (official: the model's dtype, ties open). Transitions are not computed while decoding, where
    nothing reads them, and nothing is truncated to a maximal length.
    `schedule="low"` was not released: its ratios are inferred, as those on the same layers that
    give the published FLOPs (1.19 T for 576 tokens, 6.41 T for 2880).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.linalg import vecdot, vector_norm

from ...budget import round_tokens
from ...contract import (
    Cut,
    InDecoder,
    ModelShape,
    ModuleStep,
    Selection,
    Signal,
    TextAttention,
    VisualTokens,
)
from ...errors import MethodFieldError
from ...fields import check_choice
from ...ops.topk import ascending, top_k
from ...registry import register
from ...schedule import check_layers, check_ratios, cut_layers, cuts_at

Schedule = Literal["high", "low"]
Scores = Literal["both", "ttv"]

_LAYERS = (7, 9, 12)
_RATIOS: dict[Schedule, tuple[float, ...]] = {
    "high": (0.875, 0.625, 0.125),
    "low": (0.625, 0.1875, 0.0625),
}
_EPS = 1e-8  # the official code's, of cosines and of normalised scores


@register("transprune")
@dataclass(frozen=True, kw_only=True)
class TransPrune(InDecoder):
    """Cuts at `layers`, each the first to see fewer tokens; None takes the paper's three.

    Without a budget `schedule` says how many stay, or `ratios` of all tokens, one for each cut; a
    budget keeps their proportions. `scores` are the token transition variation (TTV) and the
    attention of the text, or the former alone.
    """

    needs_budget: ClassVar[bool] = False

    schedule: Schedule = "high"
    scores: Scores = "both"
    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("scores", self.scores, get_args(Scores))
        if self.layers is not None:
            check_layers(self.layers)
        if self.ratios is not None:
            check_ratios(self.ratios)
            if self.schedule != "high":
                raise MethodFieldError(
                    f"schedule={self.schedule!r} and ratios={self.ratios!r} both say how many "
                    f"tokens stay: give one of them."
                )
        layers = _LAYERS if self.layers is None else self.layers
        if len(layers) != len(self._ratios):
            raise MethodFieldError(
                f"layers={layers!r} is not possible with the {len(self._ratios)} cuts of "
                f"ratios={self._ratios!r}: give one ratio for each layer, or both fields."
            )

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        layers = [cut.layer for cut in self.cuts(shape)]
        read = [_text_reads(layer) for layer in layers] if self.scores == "both" else []
        return (*_steps(layers[0], layers[-1]), *read)

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        depth = shape.decoder.num_layers
        layers = cut_layers(self.layers, _LAYERS, depths_published=(32,), depth=depth)
        return cuts_at(layers, self._ratios)

    def most(self, num_tokens: int) -> int:
        return round_tokens(self._ratios[-1], num_tokens)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        steps = _steps(self.cuts(tokens.shape)[0].layer, tokens.layer)
        turned = torch.stack([tokens.signals[step].float() for step in steps]).sum(0)
        scores = _normalised(turned)
        if self.scores == "both":
            scores = scores + _normalised(tokens.signals[_text_reads(tokens.layer)])
        return Selection(kept=ascending(top_k(scores, keep)), scores=scores)

    @property
    def _ratios(self) -> tuple[float, ...]:
        return _RATIOS[self.schedule] if self.ratios is None else self.ratios


def _steps(first_cut: int, cut: int) -> tuple[ModuleStep, ...]:
    """What a cut has seen of the layers: those from the one before the first cut up to its own."""
    return tuple(
        ModuleStep(layer, module, transition)
        for layer in range(first_cut - 1, cut)
        for module in ("attention", "mlp")
    )


def _text_reads(layer: int) -> TextAttention:
    """The layer that is about to be cut says what its text would read."""
    return TextAttention(layer, rows="text", ahead=True)


def transition(before: Tensor, after: Tensor) -> Tensor:
    """How much a module turns and stretches each token, among the tokens of a prompt: (L,).

    Args:
        before: (L, D) what enters the module.
        after: (L, D) what it adds.
    """
    before, after = before.float(), after.float()
    size, stretched = vector_norm(before, dim=-1).clamp_min(_EPS), vector_norm(after, dim=-1)
    cosine = vecdot(before, after) / (size * stretched.clamp_min(_EPS))
    return stretched / size * (1 - cosine).softmax(0)


def _normalised(scores: Tensor) -> Tensor:
    """Scores (N,), none below 0, as shares of their sum."""
    scores = scores.float()
    return scores / (scores.sum() + _EPS)
