"""Decoding steps whose MLPs compute the neurons that a method found at work in the prompt, and no
others: behind the prompt the layer's MLP is cut to them, once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...prune.errors import UnsupportedFeatureError
from ...prune.thinned import core_neurons
from ..core_mlp import CoreMLP, missing_of
from ..hooks import Undo, before, shadow
from ..layer_names import LayerNames
from .call import InFlight
from .driver import Driver
from .prefill import Prefill


class NeuronsDriver(Driver):
    """Lets the method choose neurons in a prompt, and single new tokens pass those alone."""

    def __init__(self, text: Any, layer_names: LayerNames, flight: InFlight) -> None:
        self._text, self._layer_names, self._flight = text, layer_names, flight
        self.hooks = {"choose core": self._hook_choice, "core": self._hook_core}

    def _mlp(self, index: int) -> Any:
        return getattr(self._text.layers[index], self._layer_names.mlp)

    def _hook_choice(self, index: int) -> Undo:
        own = functools.partial(self._before_down_proj, index)
        return before(self._mlp(index).down_proj, own)

    def _hook_core(self, index: int) -> Undo:
        return shadow(self._mlp(index), "forward", functools.partial(self._pass, index))

    @torch.compiler.disable
    @torch.no_grad()
    def _before_down_proj(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._flight.prefill is not None:
            note_core(self._flight.prefill, layer, self._mlp(layer), args[0])

    @torch.compiler.disable
    def _pass(self, layer: int, original: Callable[[Tensor], Tensor], given: Tensor) -> Tensor:
        continued = self._flight.continued
        if continued is None or given.shape[1] != 1:
            return original(given)
        core = continued.state.core.get(layer)
        return original(given) if core is None else core(given)


def note_core(prefill: Prefill, layer: int, mlp: Any, activations: Tensor) -> None:
    """Behind a layer's MLP: what decoding goes on with in it, where a method thins it.

    Args:
        activations: (1, length, M), what the last projection was given.
    """
    setup, state = prefill.setup, prefill.inputs.state
    thinned, method = setup.thinned.get(layer), setup.thinning
    if thinned is None or method is None or thinned.neurons == 1 or state is None:
        return
    if (missing := missing_of(mlp)) is not None:  # an adapter came after the patch
        raise UnsupportedFeatureError(
            f"{method.name} decodes with some of the neurons of decoder layer {layer}, and its "
            f"{type(mlp).__name__} {missing}: merge adapters into the model first, or leave "
            f"neurons out."
        )
    stopwatch = prefill.images[0].stopwatch
    with stopwatch, torch.autocast(stopwatch.device.type, enabled=False):
        tokens = min(prefill.inputs.layout.counts[0], activations.shape[1])
        own = activations[0, -tokens:].detach()
        keep = thinned.neurons_of(own.shape[1])
        kept = core_neurons(method, own, keep, debug=setup.debug)
        state.core[layer] = CoreMLP.of(mlp, kept)
    prefill.last.neurons[layer] = kept
