"""VScan: keep what shallow layers see in every window and deep ones anywhere, merge the rest.

Reference: VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models,
    arXiv 2505.22654.
Upstream: Tencent/SelfEvolvingAgent, VScan/llava/model/llava_arch.py (window_cls_selection,
    token_merging), VScan/llava/model/modeling_llama_x.py (layer_prune) and
    VScan/qwen/model/qwen2_5_vl_utils.py (window_selection), VScan/qwen/model/qwen2_5_vl_custom.py,
    commit a82450e1b5e15070bee79ee8b79f8d9a97cb85f7.
Differs: exactly the budget stays: what windows leave over goes to the deep layer (official, with
    CLS: it is lost, and below one token for each window the code fails).
    One number is the budget, of what stays in the end: three times as many tokens pass the first
    stage, as in the published settings of both models (96 and 32 of 576; 0.167 and 0.333).
    Rows and columns beyond the last whole window belong to it on all encoders, and a side shorter
    than one is one window (official, with CLS: 24 x 24 alone).
    The second stage is rotated on all models (official on Qwen: not), and chooses among all tokens
    of an image by the prompt's true last token (official with tiles: among the first ones).
    Positions: re-packed, as for LLaVA; models with M-RoPE keep theirs.
    Cosines are float32 and ties go to the lower index (official: the model's dtype, ties open).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from ...batches import InOnePass, stacked
from ...contract import (
    Cut,
    Features,
    ModelShape,
    Newlines,
    Place,
    Selection,
    Signal,
    TextAttention,
    VisualTokens,
)
from ...fields import check_flag, check_layer
from ...layers import cut_layer, encoder_layer, scale_layer
from ...ops.merge import merged_nearest
from ...ops.parts import on_device
from ...ops.topk import ascending, top_k
from ...ops.windows import numbers_of, ranks, whole
from ...registry import register
from ...salience import WITHOUT_CLS, Scores, check_scores, salience

_FIRST = 3.0  # tokens behind the first stage for each behind the second
_LAYER = (
    "give the first decoder layer that sees fewer tokens in the second stage, at least 1; or "
    "late=False"
)


@register("vscan")
@dataclass(frozen=True, kw_only=True)
class VScan(InOnePass):
    """Half of the tokens from all windows, half from anywhere; the others join the most alike.

    `shallow_layer` and `deep_layer` are ViT layers; None takes the published ones: 5 and -2 of 24
    where CLS is read, 7 and -1 of 32 by received attention. `late` cuts to a third in front of
    decoder layer `layer` (None: half way), by what the prompt's last token attends to.
    """

    needs_grid: ClassVar[bool] = True
    newline_policies: ClassVar[tuple[Newlines, ...]] = ("keep", "drop")
    without_cls: ClassVar[Mapping[str, object]] = WITHOUT_CLS

    shallow_layer: int | None = None
    deep_layer: int | None = None
    scores: Scores = "cls"
    late: bool = True
    layer: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("shallow_layer", self.shallow_layer)
        check_layer("deep_layer", self.deep_layer)
        check_scores(self.scores)
        check_flag("late", self.late)
        check_layer("layer", self.layer)

    @property
    def places(self) -> tuple[Place, ...]:
        return (Place.BEFORE_LLM, Place.DECODER) if self.late else (Place.BEFORE_LLM,)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        late = (_text_attention(cut.layer) for cut in self.cuts(shape)[1:])
        return tuple(dict.fromkeys([*self._layers(shape), Features(), *late]))

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        if not self.late:
            return (Cut(Place.BEFORE_LLM),)
        if self.layer is None:
            layer = scale_layer(16, depth_published=32, depth=shape.decoder.num_layers)
        else:
            layer = cut_layer(self.layer, shape, _LAYER)
        return (Cut(Place.BEFORE_LLM, share=_FIRST), Cut(Place.DECODER, layer))

    def select_equal(self, images: Sequence[VisualTokens], keep: int) -> list[Selection]:
        if images[0].place is Place.DECODER:
            return [self._second(tokens, keep) for tokens in images]
        shallow, deep = (stacked(images, s).float() for s in self._layers(images[0].shape))
        local = self._local(images, shallow, keep)
        kept = ascending(top_k(deep.masked_fill(local, torch.inf), keep))
        rows, row, members = merged_nearest(stacked(images, Features()), kept)
        groups = torch.stack([row, members], 1)
        return [
            Selection(kept=k, features=f, projected=True, groups=g, scores=s)
            for k, f, g, s in zip(kept, rows, groups, deep, strict=True)
        ]

    def _local(self, images: Sequence[VisualTokens], shallow: Tensor, keep: int) -> Tensor:
        """(B, N) bool: half of `keep` at most, of all windows."""
        size = 6 if self.scores == "cls" else 4
        of_images = [on_device(numbers_of(one.grid, size), shallow.device) for one in images]
        ranked = ranks(shallow, torch.stack(of_images))
        counts = [prod(whole(tokens.grid, size)) for tokens in images]
        half = keep // 2
        if self.scores == "cls":
            quotas = [half // count for count in counts]
            return ranked < _column(quotas, shallow)
        quotas = [-(-half // count) for count in counts]
        among = shallow.masked_fill(ranked >= _column(quotas, shallow), -torch.inf)
        taken = top_k(among, half)
        return torch.zeros_like(ranked, dtype=torch.bool).scatter(1, taken, True)

    def _second(self, tokens: VisualTokens, keep: int) -> Selection:
        scores = tokens.signals[_text_attention(tokens.layer)]
        return Selection(kept=ascending(top_k(scores, keep)), scores=scores)

    def _layers(self, shape: ModelShape) -> list[Signal]:
        """Signals of the shallow and of the deep layer."""
        tower = shape.tower
        if self.scores == "cls":
            published = ((self.shallow_layer, 5, 24), (self.deep_layer, -2, 24))
        else:
            published = ((self.shallow_layer, 7, 32), (self.deep_layer, -1, 32))
        fields = ("shallow_layer", "deep_layer")
        layers = (
            encoder_layer(given, layer, tower, depth_published=depth, field=field)
            for (given, layer, depth), field in zip(published, fields, strict=True)
        )
        return [salience(self.scores, layer) for layer in layers]


def _column(counts: Sequence[int], like: Tensor) -> Tensor:
    """(B, 1) int64 on the device of `like`."""
    return on_device(counts, like.device)[:, None]


def _text_attention(layer: int) -> TextAttention:
    """The layer that is about to be cut says what the prompt's last token would read."""
    return TextAttention(layer, rows="last", ahead=True)
