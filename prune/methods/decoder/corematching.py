"""CoreMatching: keep the visual tokens that share most active MLP neurons with the whole prompt.

Reference: CoreMatching: A Co-adaptive Sparse Inference Framework with Token and Neuron Pruning for
    Comprehensive Acceleration of Vision-Language Models, ICML 2025, arXiv 2505.19235.
Upstream: wangqinsi1/2025-ICML-CoreMatching, transformers/models/llama/modeling_llama.py
    (LlamaMLP.forward), commit 046b24e6bd6b42a53cd214f49ee061835fd50827.
Differs: the default is the paper's rule, which the released code does not hold: that one counts the
    neurons shared with one question token, for every positive activation, in each of the layers 5
    to 18, and then sets keys and values of these layers to zero, which removes nothing.
    One cut, behind the first of these layers: later layers run on the core tokens alone.
    Decoding with the core neurons only, the paper's other half, is off unless `neurons` is given:
    the release has no code of it. (TextVQA of LLaVA-1.5-7B by their share .2, .4, .6, .8, 1, in the
    paper: 45.1, 53.2, 55.8, 56.3, 57.8.) Inferred: the layers are those from `layer` on, each with
    neurons of its own, from all tokens of the prompt that are alive in it; steps of more than one
    token pass all neurons. The three projections are cut to them once behind the prompt, so that
    `neurons` of their bytes are held twice while its cache lives. With 0.4 of them in 5 of 6 layers
    a step took 0.82 of one through whole MLPs (width 2048, float32, 2 cores of an AMD EPYC:
    bench_neurons.json), after a choice that took as long as some 30 steps save.
    `rho` and `beta` are inferred, as is that a value at the percentile counts as above it.
    The prompt's tokens are those of the image and the text behind it; every image has its own.
    At least one token stays, and a budget is possible: the tokens with the largest overlaps.
    The question token is the prompt's last (official: the fifth from the end, which is the
    question's last in one prompt format).
    Positions stay the original ones, which the paper leaves open.
    Published for 32 layers; elsewhere the layer has the same relative depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ...contract import (
    Cut,
    InDecoder,
    ModelShape,
    Neurons,
    Place,
    Positions,
    Selection,
    Signal,
    Thinned,
    VisualTokens,
)
from ...errors import MethodFieldError
from ...fields import check_choice, check_fraction, check_layer, check_share
from ...layers import scale_layer, user_layer
from ...ops.elbow import elbow
from ...ops.topk import ascending, top_k
from ...registry import register

Reference = Literal["sentence", "question"]
_ROWS = 64  # tokens whose neurons are compared at once


@register("corematching")
@dataclass(frozen=True, kw_only=True)
class CoreMatching(InDecoder):
    """One cut behind decoder layer `layer`, whose neurons are read; None takes the paper's first.

    A token's core neurons are those above the `rho`-quantile of its positive activations. They are
    compared with the share `beta` of neurons that are core neurons of most tokens
    (`reference="sentence"`), or with the active neurons of a question token (`"question"`).

    `neurons` is the share of them with which decoded tokens pass the MLPs of the layers from
    `layer` on: those that are core neurons of most tokens. 1.0: all. One prompt at a time.
    """

    positions: ClassVar[Positions] = "original"
    needs_budget: ClassVar[bool] = False
    finds_count: ClassVar[bool] = True
    retired: ClassVar[Mapping[str, object]] = {"official": False}
    gained: ClassVar[Mapping[str, object]] = {"neurons": 1.0}

    layer: int | None = None
    rho: float = 0.2
    beta: float = 0.4
    reference: Reference = "sentence"
    neurons: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layer("layer", self.layer)
        check_fraction("rho", self.rho)
        check_fraction("beta", self.beta)
        check_choice("reference", self.reference, get_args(Reference))
        check_share("neurons", self.neurons)

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        overlap = Overlap(self.rho, self.beta, self.reference)
        return (Neurons(self._layer(shape), overlap),)

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        return (Cut(Place.DECODER, self._layer(shape) + 1),)

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        overlaps = self._overlaps(tokens)
        return Selection(kept=ascending(top_k(overlaps, keep)), scores=overlaps)

    def select_adaptive(self, tokens: VisualTokens) -> Selection:
        overlaps = self._overlaps(tokens)
        core = overlaps > elbow(overlaps)
        core = core.index_fill(0, overlaps.argmax(), True)  # where all are equal
        return Selection(kept=core.nonzero()[:, 0], scores=overlaps)

    def most(self, num_tokens: int) -> int:
        return max(1, num_tokens - 2)  # the elbow is not the last point, and itself not above it

    def thinned(self, shape: ModelShape) -> tuple[Thinned, ...]:
        if self.neurons == 1:
            return ()
        layers = range(self._layer(shape), shape.decoder.num_layers)
        return tuple(Thinned(layer=layer, neurons=self.neurons) for layer in layers)

    def core_neurons(self, activations: Tensor, keep: int) -> Tensor:
        overlap = Overlap(self.rho, self.beta, self.reference)
        frequency = overlap.frequency((activations,), [overlap.least(activations)])
        return ascending(top_k(frequency, keep))

    def _layer(self, shape: ModelShape) -> int:
        depth = shape.decoder.num_layers
        if self.layer is None:
            return scale_layer(5, depth_published=32, depth=depth)
        layer = user_layer(self.layer, depth=depth, field="layer")
        if layer == depth - 1:
            raise MethodFieldError(
                f"layer={self.layer} is the last layer of this model: no layer behind it would see "
                f"fewer tokens. Use 0..{depth - 2}."
            )
        return layer

    def _overlaps(self, tokens: VisualTokens) -> Tensor:
        (neurons,) = self.needs(tokens.shape)
        return tokens.signals[neurons]


@dataclass(frozen=True, slots=True)
class Overlap:
    """How many of its core neurons each token shares with the reference, see `CoreMatching`."""

    rho: float
    beta: float
    reference: Reference

    def __call__(self, visual: Tensor, text: Tensor) -> Tensor:
        """Counts (N,) float32 from activations (N, M) and (T, M), in O(N + M) memory."""
        least = [self.least(part) for part in (visual, text)]
        if self.reference == "question":
            wanted = text[-1] > 0
        else:
            wanted = self._most_frequent((visual, text), least)
        counts = [core.float() @ wanted.float() for core in _core(visual, least[0])]
        return torch.cat(counts)

    def least(self, activations: Tensor) -> Tensor:
        """The least activation (n, 1) of each token's core neurons."""
        return torch.cat([_quantile(rows, self.rho) for rows in activations.split(_ROWS)])

    def frequency(self, parts: Sequence[Tensor], least: Sequence[Tensor]) -> Tensor:
        """(M,) int64: of how many tokens each neuron is a core neuron."""
        frequency = parts[0].new_zeros(parts[0].shape[1], dtype=torch.int64)
        for part, above in zip(parts, least, strict=True):
            for core in _core(part, above):
                frequency += core.sum(0)
        return frequency

    def _most_frequent(self, parts: Sequence[Tensor], least: Sequence[Tensor]) -> Tensor:
        """(M,) bool: the core neurons of the prompt."""
        frequency = self.frequency(parts, least)
        count = max(1, round(self.beta * len(frequency)))
        core = torch.zeros_like(frequency, dtype=torch.bool)
        return core.index_fill_(0, top_k(frequency, count), True)


def _quantile(activations: Tensor, rho: float) -> Tensor:
    """The `rho`-quantile (n, 1) of each row's positive values; nan where a row has none."""
    values = activations.float()
    positive = values.where(values > 0, torch.nan)
    return positive.nanquantile(rho, dim=1, keepdim=True, interpolation="higher")


def _core(activations: Tensor, least: Tensor) -> Iterator[Tensor]:
    """Which neurons are core neurons of each token, (n, M) bool, some tokens at a time."""
    for start in range(0, len(activations), _ROWS):
        part = slice(start, start + _ROWS)
        yield activations[part] >= least[part]
