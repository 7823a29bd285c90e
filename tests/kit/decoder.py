"""Cuts in the decoder of a published model: tokens there, counts, averages."""

from collections.abc import Mapping

import torch
from kit.greedy import rand
from torch import Tensor
from vlmprune.prune.budget import plan, tokens_per_layer
from vlmprune.prune.contract import (
    Decoder,
    Hidden,
    LayerSignal,
    MeanHidden,
    ModelShape,
    Place,
    Signal,
    Tower,
    VisualTokens,
)
from vlmprune.prune.registry import method_class
from vlmprune.prune.tiling import Block, Tiling

TILED = Tiling((Block((3,), (3,)), Block((2, 3), (3, 2), "rows")))  # 9 + 25 patches, 5 newlines


def model(depth: int = 32) -> ModelShape:
    decoder = Decoder(num_layers=depth, hidden_size=4096, intermediate_size=11008)
    return ModelShape(tower=Tower(num_layers=24, has_cls=True), decoder=decoder)


def stages(
    call, num_tokens: int = 576, depth: int = 32, images: str = "query"
) -> list[tuple[int, int]]:
    return [(s.layer, s.keep) for s in plan(num_tokens, [call], model(depth), images)]


def entering(call, num_tokens: int = 576, depth: int = 32) -> list[int]:
    return tokens_per_layer(num_tokens, plan(num_tokens, [call], model(depth)), depth)


def average(call, num_tokens: int = 576, depth: int = 32, *, shift: int = 0) -> float:
    """Mean tokens entering the layers, or (1) those left behind each."""
    found = entering(call, num_tokens, depth)
    return sum(found[shift:] + found[-1:] * shift) / depth


def layers_of(name: str, depth: int, **fields) -> list[int]:
    return [cut.layer for cut in method_class(name)(**fields).cuts(model(depth))]


def at_cut(
    signals: Mapping[Signal, Tensor],
    *,
    layer: int,
    depth: int = 32,
    alive: Tensor | None = None,
    tiling: Tiling | None = None,
) -> VisualTokens:
    """The tokens at a cut; of the signals those that a method may have seen by then."""
    num_tokens = next(len(value) for key, value in signals.items() if key.per == "token")
    return VisualTokens(
        num_tokens=num_tokens,
        tiling=tiling or Tiling.single(1, num_tokens),
        shape=model(depth),
        signals=signals,
        alive=torch.arange(num_tokens) if alive is None else alive,
        place=Place.DECODER if layer else Place.BEFORE_LLM,
        layer=layer,
    )


DEPTHS = (4, 5, 6, 24, 27, 28, 32, 36, 40, 48, 80)


def in_decoder(name: str, fields: dict, layer: int, *, constant=False):
    """The method, and tokens at this cut with what it has seen by then."""
    method, num_tokens = method_class(name)(**fields), TILED.num_tokens
    signals: dict[Signal, Tensor] = {}
    for number, need in enumerate(method.needs(model())):
        if not isinstance(need, LayerSignal):
            continue
        entering = isinstance(need, Hidden | MeanHidden)
        if need.layer < layer or (need.layer == layer and entering):
            sizes = {Hidden: (num_tokens, 8), MeanHidden: (8,)}
            values = rand(number, *sizes.get(type(need), (num_tokens,)))
            signals[need] = torch.ones_like(values) if constant else values
    return method, at_cut(signals, layer=layer, tiling=TILED)
