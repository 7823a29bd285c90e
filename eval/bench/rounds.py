"""The rounds of `vlmprune bench model`: every variant in turn, patched and then as an oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.cache import pruned_state
from ...adapters.clip_text import ClipText
from ...adapters.family import IMAGE
from ...adapters.patching import Handle
from ...adapters.registry import family_of
from ...adapters.report import Stopwatch
from ..compose import Parts
from ..energy import EnergyMeter, energy_meter
from ..measure import kv_bytes
from ..memory import added_at_peak
from ..shapes import words
from .oracle import oracle_prefill, shorten
from .subject import Subject, visual_tokens_of
from .variant import Round, Run, Variant


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    variants: Sequence[Variant],
    new_tokens: int,
    number: int = 1,
    clip: ClipText | None = None,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """One round: all variants in turn, the first of which is dense, each beside its oracle.

    Args:
        number: of the round. Round 0 only warms up; it must come first, as it tells what the
            oracles are given. Patched and oracle runs change places from round to round.
        clip: for methods that compare image and question.
    """
    bench = _Bench(model, inputs, new_tokens if number else 1, clip)
    dense: Run | None = None
    for variant in variants:
        oracle = bench.oracle(variant) if variant.parts and number % 2 else None
        patched = bench.patched(variant)
        if variant.parts and oracle is None:
            oracle = bench.oracle(variant)
        dense = dense or patched
        if number:
            variant.rounds.append(Round(dense, patched, oracle))
        advance()


class _Bench:
    """One model and one batch of prompts, with clocks around them."""

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        new_tokens: int,
        clip: ClipText | None,
    ) -> None:
        self.model, self.inputs, self.new_tokens, self.clip = model, inputs, new_tokens, clip
        self.family = family_of(model)
        self.tower = self.family.vision_tower(model)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.meter = energy_meter(self.device)
        self.layers = self.family.shape(model).decoder.num_layers
        self.visual = visual_tokens_of(model, inputs)
        self.padded = not bool(inputs["attention_mask"].all())

    def patched(self, variant: Variant) -> Run:
        """A run as the variant has it, which notes what it leaves."""
        variant.pictures = list(self.family.pictures(self.model, IMAGE, self.inputs)[0])
        variant.visual_tokens = self.visual
        variant.text_tokens = self.inputs["input_ids"].shape[1] - self.visual
        variant.per_layer = [self.visual] * self.layers
        select = 0.0
        held = _reset_peak(self.device)
        with variant.patched(self.model, self.clip) as handle:
            output, first = self.clock(partial(prefill, self.model, self.inputs))
            if handle is not None:
                select, variant.cuts = handle.last.select_seconds, cuts_of(handle)
                variant.per_layer = longest(handle)
                variant.unread_layers = handle.unread_layers
            cache = output.past_key_values
            variant.cache_bytes = kv_bytes(cache)
            variant.entries = _attended(cache)
            run = self.decoded(first, output, select, self.inputs["attention_mask"])
        if held is not None:
            added = torch.cuda.max_memory_allocated(self.device) - held
            variant.peak_memory_bytes = max(variant.peak_memory_bytes or 0, added)
        return run

    def oracle(self, variant: Variant) -> Run:
        """A run of the unpatched model on what a variant leaves."""
        call = partial(oracle_prefill, self.model, self.inputs, variant.cuts)
        output, first = self.clock(call)
        shorten(output.past_key_values, variant.entries)
        lengths = {layer.keys.shape[2] for layer in output.past_key_values.layers}
        eager = self.model.config.get_text_config()._attn_implementation == "eager"
        if (self.padded or eager) and len(lengths) > 1:
            return first  # its layers would need masks of their own, which the model does not make
        mask = _cut(self.inputs["attention_mask"], min(lengths))
        return self.decoded(first, output, 0.0, mask)

    def decoded(self, first: Run, output: Any, select: float, mask: Tensor) -> Run:
        """`first` with what decoding behind it takes."""
        call = partial(decode, self.model, output, self.new_tokens, mask if self.padded else None)
        _, rest = self.clock(call)
        return Run(
            total=first.total,
            vision=first.vision,
            select=select,
            per_decoded_token=rest.total / self.new_tokens,
            joules=first.joules,
            joules_per_decoded_token=None if rest.joules is None else rest.joules / self.new_tokens,
        )

    def clock(self, call: Callable[[], Any]) -> tuple[Any, Run]:
        return clock(call, self.tower, self.device, self.meter)


def _cut(mask: Tensor, length: int) -> Tensor:
    """A mask (B, L) whose padding is on the left, for `length` columns with as much of it."""
    missing = (mask == 0).sum(1, keepdim=True)
    return (torch.arange(length, device=mask.device) >= missing).to(mask.dtype)


def clock(
    call: Callable[[], Any], tower: Any, device: torch.device, meter: EnergyMeter | None
) -> tuple[Any, Run]:
    """What a call gives, and what it took; on CUDA by events, so that nothing waits in between."""
    total, vision = Stopwatch(device), Stopwatch(device)
    hooks = (
        tower.register_forward_pre_hook(lambda *_: vision.__enter__() and None),
        tower.register_forward_hook(lambda *_: vision.__exit__(None, None, None)),
    )
    try:
        before = meter.joules() if meter else 0.0
        with total:
            result = call()
        seconds = total.seconds  # waits for the device
        joules = meter.joules() - before if meter else None
    finally:
        for hook in hooks:
            hook.remove()
    return result, Run(seconds, vision.seconds, 0.0, None, joules)


def prefill(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    """One forward up to the logits of the first new token."""
    return model(**inputs, use_cache=True, logits_to_keep=1)


def decode(model: PreTrainedModel, output: Any, new_tokens: int, mask: Tensor | None) -> None:
    """Feed `new_tokens` random words behind a prefill, one after the other.

    Args:
        mask: (B, L) of the prompt, where something is padded.
    """
    fed = words(model.config, new_tokens, seed=1).to(output.logits.device)
    batch_size = len(output.logits)
    for word in fed:
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(batch_size, 1)], 1)
        model(
            input_ids=word.expand(batch_size, 1),
            attention_mask=mask,
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
        )


def longest(handle: Handle) -> list[int]:
    """Visual tokens per layer of the longest sample, which the others are padded to: adaptive
    rules find different counts."""
    return [max(layer) for layer in zip(*handle.last.tokens_per_layer, strict=True)]


def cuts_of(handle: Handle) -> list[tuple[int, int]]:
    """Counts decide: rows of merged tokens have no number of their own."""
    entering = longest(handle)
    before = [max(handle.last.tokens_in), *entering]
    return [
        (layer, now)
        for layer, (was, now) in enumerate(zip(before, entering, strict=False))
        if now != was
    ]


def _attended(cache: Any) -> list[int]:
    """Entries of each layer that a decoding step attends to."""
    stored = [layer.keys.shape[2] for layer in cache.layers]
    state = pruned_state(cache)
    most = -1 if state is None or state.attended is None else int(state.attended.max())
    return stored if most <= 0 else [min(count, most) for count in stored]


def _reset_peak(device: torch.device) -> int | None:
    """Bytes that are allocated on CUDA now, from which the next peak counts; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


@torch.inference_mode()
def peak_memory(subject: Subject, parts: Parts, new_tokens: int, threads: int) -> int:
    """Bytes that prefill and decoding add to the loaded model at their peak, on the CPU of a
    process that has nothing else to do."""
    torch.set_num_threads(threads)
    model = subject.model("cpu")
    inputs = subject.inputs("cpu")
    mask = inputs["attention_mask"] if subject.ragged else None
    with Variant(parts).patched(model, subject.text_twin("cpu")):
        return added_at_peak(lambda: decode(model, prefill(model, inputs), new_tokens, mask))
