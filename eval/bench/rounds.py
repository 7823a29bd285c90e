"""The rounds of `vlmprune bench model`: every variant in turn, patched and then as an oracle."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.cache.pruned import pruned_state
from ...adapters.cache_names import cache_of
from ...adapters.clip_text import ClipText
from ...adapters.family import IMAGE
from ...adapters.handle import Handle
from ...adapters.registry import family_of
from ...prune.thinned import thinned_layers
from ..measure.energy import energy_meter
from ..measure.memory import added_at_peak
from ..measure.shortened import measured
from ..measure.times import kv_bytes
from ..words.parts import Parts
from .decoding import Decoding, in_turn
from .oracle import oracle_prefill, shorten, stored_entries
from .slicing import sliced
from .subject import Subject, visual_tokens_of
from .turns import Timed, take_turns
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
        if not number:
            bench.note_peak(variant, new_tokens)
        patched, oracle = bench.side_by_side(variant, number)
        dense = dense or patched
        if number:
            variant.rounds.append(Round(dense, patched, oracle))
        advance()


class _Bench:
    """One model, its twin to be patched, and one batch of prompts, with clocks around them."""

    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        new_tokens: int,
        clip: ClipText | None,
    ) -> None:
        self.model, self.twin = model, twin(model)
        self.inputs, self.new_tokens, self.clip = inputs, new_tokens, clip
        self.family = family_of(model)
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.meter = energy_meter(self.device)
        self.layers = self.family.shape.decoder.num_layers
        self.visual = visual_tokens_of(model, inputs)
        self.padded = not bool(inputs["attention_mask"].all())

    def side_by_side(self, variant: Variant, number: int) -> tuple[Run, Run | None]:
        """The patched model and the oracle, layer by layer and step by step in turn; the dense
        model and round 0 have no oracle."""
        with (
            variant.patched(self.twin, self.clip) as handle,
            sliced(self.model, variant.calls if number else ()),
        ):
            calls = [Timed(partial(prefill, self.twin, self.inputs), self.twin)]
            if variant.parts and number:
                given = partial(oracle_prefill, self.model, self.inputs, variant.cuts)
                calls.append(Timed(given, self.model))
            take_turns(calls if number % 2 else calls[::-1])
            prefilled = [self.patched(variant, handle, calls[0])]
            prefilled += [self.oracle(variant, call) for call in calls[1:]]
            if self.meter is not None:
                for call, one in zip(calls, prefilled, strict=True):
                    one.run.joules = self.meter.spent(call.call)
            self.decode([one for one in prefilled if one.decodes])
        patched, *oracle = (one.run for one in prefilled)
        return patched, oracle[0] if oracle else None

    def patched(self, variant: Variant, handle: Handle | None, call: Timed) -> _Prefilled:
        """A prefill as the variant has it; what it leaves is noted."""
        images = self.family.pictures(self.family.call(IMAGE, self.inputs))
        variant.pictures = list(images[0])
        variant.visual_tokens = self.visual
        variant.text_tokens = self.inputs["input_ids"].shape[1] - self.visual
        variant.per_layer = [self.visual] * self.layers
        run = Run(call.seconds, call.vision_seconds)
        if handle is not None:
            run.select, variant.cuts = handle.last.select_seconds, cuts_of(handle)
            variant.per_layer = longest(handle)
            variant.unread_layers = handle.unread_layers
            every = [picture for image in images for picture in image]
            (rows,) = measured(handle, handle.last, [every], self.family.shape)
            variant.shortened = rows[: len(images[0])]
            variant.thinned = thinned_layers(handle.methods, self.family.shape)
        cache = cache_of(call.result)
        variant.cache_bytes = kv_bytes(cache)
        variant.entries = _attended(cache)
        mask = self.inputs["attention_mask"] if self.padded else None
        return _Prefilled(run, Decoding(self.twin, call.result, mask))

    def oracle(self, variant: Variant, call: Timed) -> _Prefilled:
        """A prefill of the unpatched model on what a variant leaves."""
        cache = cache_of(call.result)
        shorten(cache, variant.entries)
        lengths = {count for count in stored_entries(cache) if count}
        eager = self.model.config.get_text_config()._attn_implementation == "eager"
        # Layers of unequal lengths would need masks of their own, which the model does not make.
        decodes = len(lengths) == 1 or not (self.padded or eager)
        mask = _cut(self.inputs["attention_mask"], min(lengths)) if self.padded else None
        run = Run(call.seconds, call.vision_seconds)
        return _Prefilled(run, Decoding(self.model, call.result, mask), decodes)

    def decode(self, prefilled: Sequence[_Prefilled]) -> None:
        """What decoding takes, noted in the runs."""
        if self.meter is not None:  # which is too coarse for single layers and steps
            for one in prefilled:
                joules = self.meter.spent(partial(one.decoding.run, self.new_tokens))
                one.run.joules_per_decoded_token = joules / self.new_tokens
        seconds = in_turn([one.decoding for one in prefilled], self.new_tokens)
        for one, steps in zip(prefilled, seconds, strict=True):
            one.run.per_decoded_token = median(steps)

    def note_peak(self, variant: Variant, new_tokens: int) -> None:
        """What prefill and decoding add on CUDA at their peak; elsewhere nothing."""
        if self.device.type != "cuda":
            return
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        mask = self.inputs["attention_mask"] if self.padded else None
        with variant.patched(self.twin, self.clip):
            Decoding(self.twin, prefill(self.twin, self.inputs), mask).run(new_tokens)
        variant.peak_memory_bytes = torch.cuda.max_memory_allocated(self.device) - held


@dataclass
class _Prefilled:
    """A prefill, and what decodes behind it."""

    run: Run
    decoding: Decoding
    decodes: bool = True


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model a second time, on the same weights: one can be patched beside the other."""
    shared = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in shared})


def _cut(mask: Tensor, length: int) -> Tensor:
    """A mask (B, L) whose padding is on the left, for `length` columns with as much of it."""
    missing = (mask == 0).sum(1, keepdim=True)
    return (torch.arange(length, device=mask.device) >= missing).to(mask.dtype)


def prefill(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    """One forward up to the logits of the first new token."""
    return model(**inputs, use_cache=True, logits_to_keep=1)


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
    stored = stored_entries(cache)
    state = pruned_state(cache)
    most = -1 if state is None or state.attended is None else int(state.attended.max())
    return stored if most <= 0 else [min(count, most) for count in stored]


@torch.inference_mode()
def peak_memory(subject: Subject, parts: Parts, new_tokens: int, threads: int) -> int:
    """Bytes that prefill and decoding add to the loaded model at their peak, on the CPU of a
    process that has nothing else to do."""
    torch.set_num_threads(threads)
    model = subject.model("cpu")
    inputs = subject.inputs("cpu")
    mask = inputs["attention_mask"] if subject.ragged else None
    with Variant(parts).patched(model, subject.text_twin("cpu", parts)):
        return added_at_peak(lambda: Decoding(model, prefill(model, inputs), mask).run(new_tokens))
