"""The decoder: prefills that enter it shortened and are cut between its layers, and what follows on
their caches."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.continuation import Continued
from ..cache.pruned import is_new, pruned_state
from ..cache_names import cache_given
from ..checks.calls import refuse_checkpointing
from ..devices import execution_device
from ..encoded import Encoded
from ..family import IMAGE, Modality
from ..hooks import Undo, all_of, before, behind, shadow
from ..layer_names import LayerNames
from ..patch_setup import Setup
from ..report import Last
from ..signals.decoder import Heads
from .before_llm import BeforeLLMDriver
from .beginning import begin
from .call import InFlight
from .driver import Driver

Keywords = dict[str, Any] | None
"""Missing where another thread is just putting the hook on or taking it off: see `Hooks`."""


class DecoderDriver(Driver):
    """Hooks of the text model and its layers.

    Args:
        text: the text model, a `transformers` object.
        layer_names: of its layers' modules.
        before_llm: knows images that the caller merged itself.
        setup: what calls that begin now run with.
    """

    def __init__(
        self,
        text: Any,
        layer_names: LayerNames,
        flight: InFlight,
        before_llm: BeforeLLMDriver,
        setup: Callable[[], Setup],
    ) -> None:
        self._text, self._layer_names = text, layer_names
        self._flight, self._before_llm, self._setup = flight, before_llm, setup
        self.hooks = {
            "enter": self._hook_layer,
            "attention": self._hook_attention,
            "mlp": self._hook_mlp,
            "neurons": self._hook_neurons,
            "keys": self._hook_keys,
        }

    def install(self) -> Undo:
        """What is on the text model at all times."""
        undos: list[Undo] = [
            before(self._text, self._before_text, with_kwargs=True),
            behind(self._text, self._after_text, always=True),
        ]
        if hasattr(self._text, "_deepstack_process"):
            undos.append(shadow(self._text, "_deepstack_process", self._add_deepstack))
        return all_of(undos)

    # --- the text model ----------------------------------------------------------------------

    @torch.compiler.disable
    def _before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        flight = self._flight
        if not flight.visual:
            return self._go_on(args, kwargs)
        kwargs = dict(kwargs)
        embeds = kwargs["inputs_embeds"]
        visual = {m: marks.to(embeds.device) for m, marks in flight.visual.items()}
        encoded: Mapping[Modality, Encoded] = flight.encoded
        if not encoded:  # the caller merged images into its embeddings and marked them
            setup = flight.setup or self._setup()
            kwargs["inputs_embeds"], merged = self._before_llm.from_embeds(
                setup, embeds, visual[IMAGE]
            )
            encoded = {IMAGE: merged}
        refuse_checkpointing(self._text, encoded.values())
        prefill, last = begin(encoded, visual, kwargs, flight.chosen, flight.given)
        if prefill is None:
            flight.last = last
            return args, kwargs
        flight.hold(prefill.setup.standing)
        flight.hold(prefill.setup.passing)
        flight.prefill = prefill
        return args, kwargs

    def _go_on(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Text alone: decoding, or a prompt without images."""
        flight, cache = self._flight, cache_given(kwargs)
        state = pruned_state(cache)
        if state is None:
            if is_new(cache):
                setup = self._setup()
                depth = setup.shape.decoder.num_layers
                flight.last = Last.nothing(setup.reported_positions, depth, flight.unpruned)
            return None
        if state.setup is not flight.setup or flight.chosen is None:  # else generate() holds
            flight.hold(state.setup.standing)
        kwargs = dict(kwargs)
        flight.continued = Continued.begin(state, kwargs)
        return args, kwargs

    @torch.compiler.disable
    def _after_text(self, module: nn.Module, args: Any, output: Any) -> Any:
        flight = self._flight
        prefill, flight.prefill = flight.prefill, None
        flight.continued = None
        flight.release()
        if output is None:
            return None
        if prefill is None:
            return None
        if isinstance(output, tuple):
            output = (prefill.finish(output[0]), *output[1:])
        else:
            output.last_hidden_state = prefill.finish(output.last_hidden_state)
        flight.last = prefill.last
        return output

    @torch.compiler.disable
    def _add_deepstack(
        self, original: Callable[..., Tensor], hidden: Tensor, visual: Tensor, features: Tensor
    ) -> Tensor:
        """Qwen3-VL adds visual features of their own behind its first layers."""
        prefill = self._flight.prefill
        if prefill is None:
            return original(hidden, visual, features)
        visual, rows = prefill.inputs.visual_alive(visual.to(hidden.device))
        return original(hidden, visual, features.to(hidden.device)[rows])

    # --- hooks of a layer --------------------------------------------------------------------

    def _hook_layer(self, index: int) -> Undo:
        own = functools.partial(self._before_layer, index)
        return before(self._text.layers[index], own, with_kwargs=True)

    def _hook_attention(self, index: int) -> Undo:
        own = functools.partial(self._after_attention, index)
        return behind(self._text.layers[index].self_attn, own, with_kwargs=True)

    def _hook_mlp(self, index: int) -> Undo:
        own = functools.partial(self._after_mlp, index)
        return behind(self._mlp(index), own)

    def _hook_neurons(self, index: int) -> Undo:
        own = functools.partial(self._before_down_proj, index)
        # Adapters exchange it while the patch is on.
        last = getattr(self._mlp(index), self._layer_names.down)
        return before(last, own)

    def _mlp(self, index: int) -> Any:
        return getattr(self._text.layers[index], self._layer_names.mlp)

    def _hook_keys(self, index: int) -> Undo:
        own = functools.partial(self._project_keys, index)
        return shadow(self._text.layers[index].self_attn.k_proj, "forward", own)

    @torch.compiler.disable
    def _before_layer(
        self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: Keywords = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        prefill, continued = self._flight.prefill, self._flight.continued
        if kwargs is None:  # another thread puts it on or takes it off
            return None
        if prefill is None and (continued is None or not continued.helps(layer, kwargs)):
            return None
        hidden, *rest = args
        device = execution_device(module)  # of a sharded model, it may be another than the last
        hidden = hidden if device is None else hidden.to(device)
        if prefill is not None:
            hidden, kwargs = prefill.enter_layer(layer, module, hidden, kwargs)
            rest = [prefill.inputs.rows(layer, given) for given in rest]
            return (hidden, *rest), {**kwargs, "position_ids": None}
        assert continued is not None  # noqa: S101  (for the types)
        return (hidden, *rest), continued.layer(layer, hidden, kwargs)

    def hear(self, layer: int, heads: Heads) -> None:
        """Queries and keys of a layer, as its attention uses them."""
        if self._flight.prefill is not None:
            self._flight.prefill.show("heads", layer, heads)

    @torch.compiler.disable
    def _after_attention(
        self, layer: int, module: nn.Module, args: Any, kwargs: Any, *output: Any
    ) -> None:
        prefill = self._flight.prefill
        if prefill is not None and output:  # else another thread puts it on or off
            with torch.no_grad():
                prefill.show("attention", layer, kwargs["hidden_states"], output[0][0])

    @torch.compiler.disable
    def _after_mlp(
        self, layer: int, module: nn.Module, args: tuple[Tensor, ...], output: Tensor
    ) -> None:
        if self._flight.prefill is not None:
            with torch.no_grad():
                self._flight.prefill.show("mlp", layer, args[0], output)

    @torch.compiler.disable
    def _before_down_proj(self, layer: int, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._flight.prefill is not None:
            with torch.no_grad():
                self._flight.prefill.show("activations", layer, args[0])

    def _project_keys(
        self, layer: int, original: Callable[[Tensor], Tensor], given: Tensor
    ) -> Tensor:
        prefill = self._flight.prefill
        keys = None if prefill is None else prefill.keys_of(layer, given)
        return original(given) if keys is None else keys
