"""Images that were asked about before: what entered the LLM of them, for the next question.

Of an image only the rows that enter the LLM are kept, where they were computed: K of its N tokens.
The placeholders of the others get zeros, which nobody reads.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from ..prune.budget import MethodCall
from ..prune.choose import ChosenImage
from .encoded import Encoded
from .family import Call, Family
from .patch_setup import Setup
from .stopwatch import Stopwatch

Encode = Callable[[Call, Sequence[int] | None], tuple[Any, Encoded | None]]
"""Runs the encoder on a call that holds some images of the one made, by their numbers (None: all):
its output with the rows that enter the LLM in place, and what was chosen; None for outputs that are
plain tuples."""

_NO_MATTER = frozenset({"return_dict", "output_attentions", "output_hidden_states", "use_cache"})
"""Arguments that change what is returned beside the features."""


@dataclass(frozen=True, slots=True)
class Remembered:
    """What a memory of images did since `patch`."""

    images: int = 0
    """Images in it now."""
    hits: int = 0
    """Images that were neither encoded nor chosen from again."""
    misses: int = 0
    """Images that were."""


@dataclass(frozen=True, slots=True)
class _Known:
    """One image as it enters the LLM."""

    image: ChosenImage
    rows: Tensor
    """(K, D)"""
    deeper: tuple[Tensor, ...]
    """(K, D) each: what is added behind the first layers (deepstack)."""
    beside: Mapping[str, Tensor]
    """What else the model reads of the encoder's output."""
    output: type
    """The class of the encoder's output."""
    pooled: type
    """The class of the features in it."""

    @property
    def features(self) -> Tensor:
        """(N, D), zeros but for `rows`."""
        return self._spread(self.rows, self.image.slots)

    @property
    def deepstack(self) -> list[Tensor]:
        """(N, D) for each layer, at the tokens whose positions the rows have."""
        return [self._spread(rows, self.image.sources) for rows in self.deeper]

    def _spread(self, rows: Tensor, at: Tensor) -> Tensor:
        everything = rows.new_zeros(self.image.num_tokens, rows.shape[1])
        return everything.index_copy(0, at.to(rows.device), rows)


class ImageMemory:
    """The `capacity` images (or videos) that were asked about last, for all threads.

    An image is told by the bits of its pixels, its size, the options of the encoder, and the
    methods with their budgets that chose from it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    @property
    def remembered(self) -> Remembered:
        with self._lock:
            return Remembered(len(self._known), self._hits, self._misses)

    def forget(self) -> None:
        """Forget all images."""
        with self._lock:
            self._known.clear()

    def encode(
        self, family: Family, call: Call, encode: Encode, setup: Setup
    ) -> tuple[Any, Encoded | None]:
        """The output for all images of a call, of which `encode` sees those that are not known,
        each once."""
        learns = _learns(family, call)
        keys = None if learns else _keys(family, call)
        if keys is None:
            return encode(call, None)
        calls = setup.calls_of(range(len(keys)))
        keys = [(key, _hashable(chosen)) for key, chosen in zip(keys, calls, strict=True)]
        found = self._find(keys)
        unknown = [i for i, key in enumerate(keys) if key not in found and key not in keys[:i]]
        stopwatch = None
        if unknown:
            images: Sequence[int] = range(len(keys))
            some = call
            if len(unknown) < len(keys):
                images, some = family.only(call, unknown)
            output, encoded = encode(some, images)
            if encoded is None:
                return output, None
            stopwatch = encoded.stopwatch
            known = _known(family, some, output, encoded)
            new = dict(zip([keys[i] for i in images], known, strict=True))
            found = {**new, **found}
            self._keep({keys[i]: new[keys[i]] for i in unknown}, hits=len(keys) - len(unknown))
        else:
            self._keep({}, hits=len(keys))
        known = [found[key] for key in keys]
        stopwatch = stopwatch or Stopwatch(known[0].rows.device)
        return _output(family, call, known), Encoded([one.image for one in known], stopwatch, setup)

    def _find(self, keys: Sequence[Hashable]) -> dict[Hashable, _Known]:
        with self._lock:
            found = {key: self._known[key] for key in keys if key in self._known}
            for key in found:
                self._known.move_to_end(key)
            return found

    def _keep(self, new: Mapping[Hashable, _Known], hits: int) -> None:
        with self._lock:
            self._hits += hits
            self._misses += len(new)
            self._known.update(new)
            while len(self._known) > self.capacity:
                self._known.popitem(last=False)


def _hashable(calls: tuple[MethodCall, ...]) -> Hashable:
    """Methods with their budgets as a key; fields may be of any kind."""
    try:
        hash(calls)
    except TypeError:
        return repr(calls)
    return calls


def _learns(family: Family, call: Call) -> bool:
    """Whether the features of this call are to be trained through, or are random (dropout)."""
    if family.vision_tower.training:
        return True
    if not torch.is_grad_enabled():
        return False
    text = {id(parameter) for parameter in family.text_model.parameters()}
    return call.inputs[call.modality.pixels].requires_grad or any(
        parameter.requires_grad
        for parameter in family.core.parameters()
        if id(parameter) not in text
    )


def _keys(family: Family, call: Call) -> list[Hashable] | None:
    """What tells each image of a call from others; None where an argument cannot be told apart by
    image."""
    modality, inputs = call.modality, call.inputs
    per_image = family.per_image_arguments(modality)
    options = {k: v for k, v in inputs.items() if k not in per_image | _NO_MATTER}
    if any(isinstance(value, Tensor) for value in options.values()):
        return None
    # What a caller leaves out is the configuration's.
    own = family.model.config
    options = {k: v for k, v in options.items() if v is not None and v != getattr(own, k, None)}
    weight = next(family.vision_tower.parameters())
    pixels = inputs[modality.pixels].detach()
    device = pixels.device.type
    common = (
        modality.name,
        repr(sorted(options.items())),
        weight.device,
        weight.dtype,
        _weights(family.core, family.text_model),
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        torch.is_inference_mode_enabled(),  # its tensors cannot be trained with outside of it
    )
    # One transfer for all images.
    here = replace(call, inputs={**inputs, modality.pixels: pixels.cpu()})
    return [
        (*common, apart, image.dtype, tuple(image.shape), _digest(image))
        for apart, image in zip(family.apart(here), family.pixels(here), strict=True)
    ]


def _weights(core: Any, text: Any) -> tuple[object, ...]:
    """What changes with the weights in front of the LLM: with every step of an optimizer, weights
    that are loaded or cast, adapters that are added, switched or merged.

    Read from the host's records alone: PyTorch counts the changes of a tensor in place. Storages
    are held weakly, as other weights may come to lie where freed ones were.
    """
    tensors: list[Tensor | None] = []
    adapters: list[object] = []
    ahead = [core]
    while ahead:
        own = ahead.pop().__dict__
        ahead += [part for part in own["_modules"].values() if part not in (None, text)]
        tensors += own["_parameters"].values()
        tensors += own["_buffers"].values()
        if "merged_adapters" in own:  # PEFT merges past the counts
            of_adapter = ("merged_adapters", "_active_adapter", "_disable_adapters")
            adapters.append([own.get(name) for name in of_adapter])
    # Those that are offloaded are other ones at every call.
    here = [tensor for tensor in tensors if tensor is not None and not tensor.is_meta]
    changes = [0 if tensor.is_inference() else tensor._version for tensor in here]
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in here]
    return (*map(id, here), *storages, *changes, str(adapters))


def _digest(pixels: Tensor) -> bytes:
    """SHA-256 of the bits of an image's pixels."""
    bits = pixels.contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(bits.numpy().data).digest()


def _known(family: Family, call: Call, output: Any, encoded: Encoded) -> list[_Known]:
    """Each image of an encoder's output, on its own."""
    features = family.images(call, output.pooler_output)
    deepstack = getattr(output, "deepstack_features", None) or ()
    return [
        _Known(
            image,
            features[i][image.slots],  # a copy: a view would hold the whole batch in memory
            tuple(layer[i][image.sources.to(layer[i].device)] for layer in deepstack),
            {name: output[name] for name in family.beside},
            type(output),
            type(output.pooler_output),
        )
        for i, image in enumerate(encoded.images)
    ]


def _output(family: Family, call: Call, known: Sequence[_Known]) -> Any:
    """What the model reads of an encoder's output."""
    first = known[0]
    features = family.pooled(call, [one.features for one in known], first.pooled)
    if not first.deeper:
        return first.output(pooler_output=features, **first.beside)
    layers = zip(*(one.deepstack for one in known), strict=True)
    deepstack = [list(layer) for layer in layers]
    return first.output(pooler_output=features, deepstack_features=deepstack, **first.beside)
