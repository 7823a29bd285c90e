"""Times, memory and cache size of `generate`, measured as a user would meet them.

One call of `generate` gives all times: a logits processor notes when each step's logits arrive. So
the time to the first token holds everything between `generate(...)` and the first token's logits:
vision encoder, choice of tokens, prefill of the decoder and generate's own preparation; the
processor that turns pictures into tensors is left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn
from transformers import LogitsProcessorList

from ...adapters.cache_names import cache_of
from ...adapters.clip_text import ClipText
from ...adapters.devices import input_device
from ...adapters.handle import Handle
from ...adapters.patching import patch
from ...adapters.registry import family_of
from ...prune.budget import MethodCall
from ...prune.contract import Positions
from ..results.records import Times
from ..results.statistics import spread

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def synchronise(device: torch.device) -> None:
    """Wait for the accelerator, so that a clock read afterwards counts its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """A logits processor that notes the time of every generation step and changes no logits."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stamps: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        synchronise(self.device)
        self.stamps.append(time.perf_counter())
        return scores


@contextmanager
def module_seconds(module: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """Collect the duration of every call of `module` inside the block."""
    seconds: list[float] = []
    begun: list[float] = []

    def before(*_: object) -> None:
        synchronise(device)
        begun.append(time.perf_counter())

    def after(*_: object) -> None:
        synchronise(device)
        seconds.append(time.perf_counter() - begun.pop())

    hooks = module.register_forward_pre_hook(before), module.register_forward_hook(after)
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(kw_only=True)
class Timings:
    """Seconds of each measured call, part by part.

    `dense_first_token` is the unpatched model's time on the same input just before, and
    `share_of_dense` the ratio of the two: on a busy machine it is steadier than the times.
    """

    first_token: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    select: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    per_decoded_token: list[float] = field(default_factory=list)
    dense_first_token: list[float] = field(default_factory=list)
    share_of_dense: list[float] = field(default_factory=list)

    def summary(self) -> Times:
        return Times(**{part: spread(values) for part, values in vars(self).items()})  # type: ignore[typeddict-item]


class PatchOptions(TypedDict, total=False):
    """Arguments of `patch` beside the method."""

    positions: Positions | None
    clip: ClipText | None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What `measure` found. `kv_bytes` is the prompt's cache, a mean over the inputs."""

    timings: Timings
    kv_bytes: float
    peak_memory_bytes: int | None


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    inputs: Sequence[Mapping[str, Any]],
    *,
    calls: Sequence[MethodCall] = (),
    options: PatchOptions | None = None,
    beside: Sequence[Mapping[str, Any]] | None = None,
    new_tokens: int = 8,
) -> Measurement:
    """Time `generate` on each of `inputs` (batch 1, on the model's device), after a warm-up.

    Args:
        model: not patched; it is patched for the measured calls and left as it was.
        calls: the methods to measure, each time next to the dense model; none: that alone.
        options: further arguments of `patch`.
        beside: what the dense model is given instead, where `inputs` are smaller than its own.
        new_tokens: length of every generation; the time per decoded token is a call's mean over
            the steps after the first.

    Peak memory is what CUDA's allocator reports; on CPU it is not attributable to a call: None
    (`vlmprune bench model --memory` measures it in processes of their own).
    """
    device = input_device(model)
    tower = family_of(model).vision_tower
    timings = Timings()
    peak: int | None = None

    def patched() -> AbstractContextManager[Handle | None]:
        return patch(model, calls, **(options or {})) if calls else nullcontext()

    with patched():
        once = {id(one): one for one in inputs}.values()  # an input may be timed several times
        caches = [cache_of(_generate(model, one, 1, [])) for one in once]
        cache_bytes = [kv_bytes(cache) for cache in caches]
        del caches
        _generate(model, inputs[0], new_tokens, [])
    for number, one in enumerate(inputs):
        if calls or beside:
            dense = beside[number] if beside else one
            stamps, start = _timed(model, dense, 1, device)
            timings.dense_first_token.append(stamps[0] - start)
        with patched() as handle, module_seconds(tower, device) as vision:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            stamps, start = _timed(model, one, new_tokens, device)
            select = handle.last.select_seconds if handle else 0.0
            if device.type == "cuda":
                peak = max(peak or 0, torch.cuda.max_memory_allocated(device))
        first = stamps[0] - start
        timings.first_token.append(first)
        timings.vision.append(sum(vision))
        timings.select.append(select)
        timings.prefill.append(first - sum(vision) - select)
        if calls or beside:
            timings.share_of_dense.append(first / timings.dense_first_token[-1])
        if len(stamps) > 1:
            timings.per_decoded_token.append((stamps[-1] - stamps[0]) / (len(stamps) - 1))
    return Measurement(
        timings=timings,
        kv_bytes=sum(cache_bytes) / len(cache_bytes) if cache_bytes else 0.0,
        peak_memory_bytes=peak,
    )


def kv_bytes(cache: Any) -> int:
    """Bytes that the keys and values of a cache hold, layer by layer as long as they are; states
    of fixed size, which some layers have instead, do not count."""
    return sum(
        tensor.numel() * tensor.element_size()
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, Tensor)
    )


def _timed(
    model: PreTrainedModel, inputs: Mapping[str, Any], new_tokens: int, device: torch.device
) -> tuple[list[float], float]:
    """When each step's logits were there, and when the call began."""
    clock = Clock(device)
    synchronise(device)
    start = time.perf_counter()
    _generate(model, inputs, new_tokens, [clock])
    return clock.stamps, start


def _generate(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    new_tokens: int,
    processors: list[Clock],
) -> Any:
    return model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList(processors),
        return_dict_in_generate=True,
    )
