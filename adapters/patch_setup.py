"""What `patch` or `handle.set` fixed for the calls that follow."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ..prune.budget import Budget, MethodCall
from ..prune.contract import (
    Attending,
    BeforeLLM,
    Choosing,
    Compressing,
    Cut,
    InDecoder,
    InEncoder,
    LayerSignal,
    ModelShape,
    Place,
    Positions,
    Signal,
    Thinned,
)
from ..prune.errors import BudgetError
from ..prune.thinned import thinned_layers, thinning
from .clip_text import ClipText
from .devices import execution_device
from .hooks import Spot, Spots
from .layer_names import LLAMA, LayerNames
from .sequence.masks import layer_kind
from .signals.decoder import Turn
from .signals.table import ENCODER_ATTENTION, HOOKS, shown


class Ticket:
    """Says whether the patch that pruned a cache or encoded an image is on the model."""

    def __init__(self) -> None:
        self.active = True


@dataclass(frozen=True)
class Setup:
    """The methods in order of depth, and what follows from them and the model.

    A call runs with one from beginning to end, and a cache that it pruned goes on with it.
    """

    calls: tuple[MethodCall, ...]
    shape: ModelShape
    positions: Mapping[Place, Positions]
    """The mode at every place where a method acts."""
    text: Any
    """The text model, a `transformers` object; None: an image encoder without an LLM."""
    ticket: Ticket
    turn: Turn | None = None
    """How the text model's attention turns queries and keys."""
    names: LayerNames = LLAMA
    """What the modules of its layers are called."""
    rotates: Callable[[int], bool] = lambda layer: True
    """Whether a layer's attention turns them at all."""
    by_token: tuple[str, ...] = ()
    """Arguments of the text model with a row for each token, beside its embeddings."""
    record: bool = False
    """Whether the scores of all choices are kept for `handle.last`."""
    debug: bool = False
    """Whether the numbers that shipped methods return are looked at too."""
    clip: ClipText | None = None
    per_image: tuple[Budget, ...] | None = None
    """Budgets of the only method for the images of a call; None: that of `calls` for all."""
    projectors: int = 0
    """Modules that make tokens of the encoder's rows."""
    inherited: tuple[int, ...] = ()
    """Where segments begin besides, in a cache that another setup began."""

    def __deepcopy__(self, memo: object) -> Setup:
        return self  # a copied cache still belongs to the same patch

    @property
    def config(self) -> Any:
        """Configuration of the text model."""
        return self.text.config

    @cached_property
    def starts(self) -> list[int]:
        """First layers of the segments that store different tokens: 0, then every cut."""
        return sorted({0, *(cut.layer for cut in self.cuts), *self.inherited})

    @cached_property
    def cuts(self) -> list[Cut]:
        """All cuts of the methods."""
        return [cut for call in self.calls for cut in call.method.cuts(self.shape)]

    def on_cache_of(self, earlier: Setup) -> Setup:
        """The same, with segments that fit a cache that `earlier` has pruned."""
        if set(earlier.starts) <= set(self.starts):
            return self
        return replace(self, inherited=tuple(earlier.starts))

    @cached_property
    def heard(self) -> list[LayerSignal]:
        """Signals of decoder layers for cuts; a method on the cache is shown its own entries."""
        return [
            need
            for call in self.calls
            if isinstance(call.method, Choosing)
            for need in call.method.needs(self.shape)
            if isinstance(need, LayerSignal)
        ]

    @cached_property
    def first(self) -> BeforeLLM | None:
        """The method before the LLM."""
        return next((c.method for c in self.calls if isinstance(c.method, BeforeLLM)), None)

    @cached_property
    def in_encoder(self) -> InEncoder | None:
        """The method inside the vision encoder."""
        return next((c.method for c in self.calls if isinstance(c.method, InEncoder)), None)

    @cached_property
    def read(self) -> list[Signal]:
        """Signals of images for the method before the LLM."""
        needs = self.first.needs(self.shape) if self.first is not None else ()
        return [need for need in needs if not isinstance(need, LayerSignal)]

    @cached_property
    def tapped(self) -> dict[int, list[Any]]:
        """Signals that are read inside attention layers of the encoder, by layer."""
        found: dict[int, list[Any]] = {}
        for need in self.read:
            if shown(need) == ENCODER_ATTENTION:
                layer = need.layer  # type: ignore[attr-defined]
                layer += self.shape.tower.num_layers if layer < 0 else 0
                found.setdefault(layer, []).append(need)
        return found

    @cached_property
    def thinning(self) -> InDecoder | None:
        """The method that leaves more than tokens out of layers."""
        return thinning(self.calls, self.shape)

    @cached_property
    def thinned(self) -> Mapping[int, Thinned]:
        """What it leaves out, by layer."""
        return thinned_layers(self.calls, self.shape)

    @cached_property
    def on_cache(self) -> MethodCall | None:
        """The method on the KV cache."""
        return next((c for c in self.calls if c.method.place is Place.CACHE), None)

    @cached_property
    def evicting(self) -> Compressing | None:
        """The method that takes entries out of the cache."""
        return next((c.method for c in self.calls if isinstance(c.method, Compressing)), None)

    @cached_property
    def attending(self) -> Attending | None:
        """The method that lets decoding steps attend to a few entries."""
        return next((c.method for c in self.calls if isinstance(c.method, Attending)), None)

    @property
    def inside_the_llm(self) -> bool:
        """Whether a method acts in the decoder or on its cache."""
        return any(place > Place.BEFORE_LLM for call in self.calls for place in call.method.places)

    @property
    def reported_positions(self) -> Positions:
        """The mode of the first method."""
        return self.positions[self.calls[0].method.place]

    def start_of(self, layer: int) -> int:
        """First layer of the segment that `layer` belongs to."""
        return max(start for start in self.starts if start <= layer)

    def calls_of(self, images: Sequence[int]) -> list[tuple[MethodCall, ...]]:
        """The methods for some images of a call, by their numbers.

        Raises:
            BudgetError: budgets are given per image, and there are more images.
        """
        if self.per_image is None:
            return [self.calls] * len(images)
        if images and max(images) >= len(self.per_image):
            self.check_images(max(images) + 1)
        method = self.calls[0].method
        return [(MethodCall(method, self.per_image[number]),) for number in images]

    def check_images(self, count: int) -> None:
        """Refuse budgets per image for another number of images."""
        if self.per_image is not None and count != len(self.per_image):
            given = len(self.per_image)
            raise BudgetError(
                f"The budget is a list for {given} image{'s' * (given != 1)}, and this call has "
                f"{count}: give one for each image of the batch in order (images first, then "
                f"videos), None to keep one whole."
            )

    @cached_property
    def _rotary_by_kind(self) -> bool:
        """Whether rotary tables differ between kinds of layers."""
        return "layer_type" in inspect.signature(self.text.rotary_emb.forward).parameters

    def rotary_kind(self, layer: int) -> str:
        """What layers share that have the same rotary tables."""
        return layer_kind(self.config, layer) if self._rotary_by_kind else ""

    def rotary(self, like: Tensor, position_ids: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines that a layer has of positions (B, K) or (axes, B, K): (B, K, D_head)
        each, in the dtype and on the device of `like`."""
        if position_ids.dim() == 3:
            position_ids = position_ids[-3:]  # without the row that only tells packed sequences
        kind = filter(None, [self.rotary_kind(layer)])
        cos, sin = self.text.rotary_emb(like, position_ids.to(like.device), *kind)
        return cos.to(like.device), sin.to(like.device)  # on a sharded model it is elsewhere

    def turned_back(self, layer: int, keys: Tensor, by: Tensor) -> Tensor:
        """Keys (H_kv, n, D_head) of a layer at positions `by` (0-d) lower than theirs."""
        attention = self.text.layers[layer].self_attn
        assert self.turn is not None  # noqa: S101  (for the types)
        cos, sin = self.rotary(keys.float(), by.view(1, 1), layer)
        size = (cos.square() + sin.square()).sqrt()  # which long contexts scale
        turned = self.turn(attention, keys[None].float(), (cos / size, -sin / size))[0]
        return turned.to(keys.dtype)

    def final_norm(self, rows: Tensor) -> Tensor:
        """Hidden states (n, D) as the norm behind the last layer gives them, on their device."""
        norm = getattr(self.text, self.names.last_norm)
        device = execution_device(norm)  # of a sharded model, it may be another
        return norm(rows if device is None else rows.to(device)).to(rows.device)  # type: ignore[no-any-return]

    @cached_property
    def with_core(self) -> list[int]:
        """Layers whose MLP decoding passes with some of the neurons."""
        return [layer for layer, one in self.thinned.items() if one.neurons < 1]

    @cached_property
    def last_heads(self) -> int:
        """The last layer that attention goes through some of the heads of; 0: none."""
        return max((layer for layer, one in self.thinned.items() if one.heads < 1), default=0)

    # --- hooks that its calls need ------------------------------------------------------------

    @cached_property
    def standing(self) -> Spots:
        """Those of all calls, decoding included."""
        layers = range(0 if self.text is None else len(self.text.layers))
        spots: set[Spot] = {("encoder", layer) for layer in self.tapped}
        if self.in_encoder is not None:
            tower = self.shape.tower
            blocks = range(self.in_encoder.blocks(tower)[0].block, tower.num_layers)
            spots |= {(what, block) for block in blocks for what in ("encoder", "block")}
            spots |= {("project", number) for number in range(self.projectors)}
        spots |= {("enter", layer) for layer in layers[min([*self.starts[1:], len(layers)]) :]}
        if self.attending is not None:
            attending = self.shape.decoder.attending
            spots |= {(what, layer) for layer in attending for what in ("tables", "tap")}
        spots |= {("core", layer) for layer in self.with_core}
        spots |= {("tap", layer) for layer, one in self.thinned.items() if one.attention}
        return frozenset(spots)

    @cached_property
    def passing(self) -> Spots:
        """Those of prefills alone."""
        layers = range(0 if self.text is None else len(self.text.layers))
        spots: set[Spot] = set()
        for need in self.heard:
            spots.add((HOOKS[shown(need)], need.layer))
        spots |= {("choose core", layer) for layer in self.with_core}
        before = (n for n in self.shape.decoder.attending if n < self.last_heads)
        spots |= {("tap", layer) for layer in before}
        if self.evicting is not None:
            attending = self.shape.decoder.attending
            spots |= {(what, layer) for layer in attending for what in ("compress", "tap")}
        if self.text is None:
            return frozenset()
        # Flash attention reads gapped position ids as packed sequences: hook every layer there.
        flash = "flash" in (self.config._attn_implementation or "")
        if flash and "original" in self.positions.values():
            spots |= {("enter", layer) for layer in layers}
        return frozenset(spot for spot in spots if spot[1] in layers)
