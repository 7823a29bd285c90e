"""Run one cell of a sweep: answers on a benchmark, tokens, FLOPs, times and cache of one method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from ..adapters.clip_text import ClipText
from ..adapters.family import IMAGE
from ..adapters.patching import Handle, patch
from ..adapters.registry import family_of
from ..prune.budget import MethodCall
from ..prune.contract import Positions
from .flops import Flops, after_cuts, cache_entries, model_cost, visual_flops, visual_share
from .measure import PatchOptions, measure
from .results import Accuracy, FlopsRecord, Measured, Tokens
from .stats import wilson
from .task import Question, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIMED_QUESTIONS = 8
_CACHED_BYTES = 2**30  # encoded questions are kept between cells up to this size


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answered question and the tokens that it took."""

    right: bool
    prediction: str
    images: list[int]
    kept: list[int]
    per_layer: list[int]
    text: int
    generated: int
    pictures: list[tuple[int, int]]
    """Rows and columns of what the vision encoder saw."""


class Evaluator:
    """A loaded model and the questions it is asked, cell after cell."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        task: Task,
        questions: Sequence[Question],
        *,
        batch_size: int,
        seed: int = 0,
        timed_questions: int = TIMED_QUESTIONS,
        repeats: int = 1,
        clip: ClipText | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.task = task
        self.questions = questions
        self.batch_size = batch_size
        self.seed = seed
        self.timed_questions = timed_questions
        self.repeats = repeats
        self.clip = clip
        self.cost = model_cost(model)
        self.device = next(model.parameters()).device
        self._encoded: dict[tuple[int, int], Any] = {}
        self._encoded_bytes = 0

    def run(
        self,
        calls: Sequence[MethodCall] = (),
        *,
        positions: Positions | None = None,
        progress: Callable[[int], None] = lambda questions: None,
        inspect: Callable[[Handle], None] = lambda handle: None,
    ) -> tuple[Measured, list[Sample]]:
        """Evaluate the dense model, or what `calls` make of it.

        Args:
            progress: told how many more questions are answered.
            inspect: given the handle after the last batch.
        """
        torch.manual_seed(self.seed)
        samples: list[Sample] = []
        notes: set[str] = set()
        modes: set[str] = set()
        options: PatchOptions = {"positions": positions, "clip": self.clip}
        with patch(self.model, calls, **options) if calls else nullcontext() as handle:
            for start in range(0, len(self.questions), self.batch_size):
                asked = self.questions[start : start + self.batch_size]
                samples += self._answer(asked, start, handle)
                if handle is not None:
                    notes |= {handle.last.note} if handle.last.note else set()
                    modes |= {handle.last.positions}
                progress(len(asked))
            if handle is not None:
                inspect(handle)
        few = range(min(self.timed_questions, len(self.questions)))
        measured = measure(
            self.model,
            [self._encode(i, 1) for i in few] * self.repeats,
            calls=calls,
            options=options,
        )
        return Measured(
            accuracy=self._accuracy(samples),
            tokens=_tokens(samples),
            flops=self._flops(samples, calls),
            times=measured.timings.summary(),
            kv_bytes=measured.kv_bytes,
            peak_memory_bytes=measured.peak_memory_bytes,
            positions=" ".join(sorted(modes)) or None,
            notes=sorted(notes),
        ), samples

    @torch.inference_mode()
    def _answer(self, asked: Sequence[Question], start: int, handle: Handle | None) -> list[Sample]:
        inputs = self._encode(start, len(asked))
        prompt = inputs["input_ids"].shape[1]
        output = self.model.generate(
            **inputs, do_sample=False, max_new_tokens=self.task.max_new_tokens
        )
        new = output[:, prompt:]
        texts = self.processor.batch_decode(new, skip_special_tokens=True)
        image_id = self.model.config.image_token_id
        visual = (inputs["input_ids"] == image_id).sum(1).tolist()
        real = inputs["attention_mask"].sum(1).tolist()
        layers = len(self.cost.layers)
        pictures = family_of(self.model).pictures(self.model, IMAGE, inputs)
        last = handle.last if handle is not None else None
        entering = last.tokens_per_layer if last else [[n] * layers for n in visual]
        kept = last.tokens_kept if last else visual
        samples = []
        for row, question in enumerate(asked):  # one image a question
            samples.append(
                Sample(
                    right=self.task.is_correct(texts[row], question),
                    prediction=texts[row].strip(),
                    images=[visual[row]],
                    kept=[kept[row]],
                    per_layer=entering[row],
                    text=real[row] - visual[row],
                    generated=self._length(new[row].tolist()),
                    pictures=list(pictures[row]),
                )
            )
        return samples

    def _encode(self, start: int, count: int) -> dict[str, Any]:
        """The model's inputs for `count` questions from `start`, left-padded."""
        key = (start, count)
        if key not in self._encoded:
            asked = self.questions[start : start + count]
            encoded = self.processor(
                text=[self.task.prompt(self.processor, q) for q in asked],
                images=[q.image for q in asked],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
            inputs = dict(encoded)
            size = sum(t.numel() * t.element_size() for t in inputs.values())
            if self._encoded_bytes + size > _CACHED_BYTES:
                return self._on_device(inputs)
            self._encoded[key] = inputs
            self._encoded_bytes += size
        return self._on_device(self._encoded[key])

    def _on_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        dtype = next(self.model.parameters()).dtype
        return {
            name: tensor.to(self.device, dtype)
            if tensor.is_floating_point()
            else tensor.to(self.device)
            for name, tensor in inputs.items()
        }

    def _length(self, new_tokens: list[int]) -> int:
        """Tokens generated up to the end of the answer, the end token included."""
        ids = self.model.generation_config.eos_token_id
        ends = {ids} if isinstance(ids, int) else set(ids or ())
        for count, token in enumerate(new_tokens, start=1):
            if token in ends:
                return count
        return len(new_tokens)

    def _accuracy(self, samples: Sequence[Sample]) -> Accuracy:
        kinds: dict[str, list[bool]] = defaultdict(list)
        for sample, question in zip(samples, self.questions, strict=True):
            kinds[question.kind].append(sample.right)
        correct = sum(sample.right for sample in samples)
        low, high = wilson(correct, len(samples))
        return Accuracy(
            value=correct / len(samples),
            n=len(samples),
            correct=correct,
            low=low,
            high=high,
            by_kind={
                kind: {"value": fmean(rights), "n": len(rights)}
                for kind, rights in sorted(kinds.items())
            },
            outcomes="".join(str(int(sample.right)) for sample in samples),
        )

    def _flops(self, samples: Sequence[Sample], calls: Sequence[MethodCall]) -> FlopsRecord:
        cost, decoder = self.cost, self.cost.decoder
        pruned: list[Flops] = []
        dense: list[Flops] = []
        visual: list[int] = []
        shares: list[float] = []
        for sample in samples:
            seen = sum(sample.images)
            for target, per_layer, entries in (
                (pruned, sample.per_layer, cache_entries(calls, sample.images, sample.text)),
                (dense, [seen] * len(sample.per_layer), None),
            ):
                target.append(
                    cost.sample(
                        pictures=sample.pictures,
                        visual_per_layer=per_layer,
                        text_tokens=sample.text,
                        new_tokens=sample.generated,
                        cache_entries=entries,
                    )
                )
            visual.append(visual_flops(sample.per_layer, decoder))
            shares.append(visual_share(sample.per_layer, seen, decoder))
        return FlopsRecord(
            vision=fmean(f.vision for f in pruned),
            projector=fmean(f.projector for f in pruned),
            prefill=fmean(f.prefill for f in pruned),
            lm_head=fmean(f.lm_head for f in pruned),
            decode=fmean(f.decode for f in pruned),
            first_token=fmean(f.first_token for f in pruned),
            visual=fmean(visual),
            visual_share=fmean(shares),
            prefill_share=sum(f.prefill for f in pruned) / sum(f.prefill for f in dense),
            first_token_share=sum(f.first_token for f in pruned)
            / sum(f.first_token for f in dense),
        )


def _tokens(samples: Sequence[Sample]) -> Tokens:
    layers = len(samples[0].per_layer)
    per_layer = [fmean(s.per_layer[i] for s in samples) for i in range(layers)]
    return Tokens(
        in_per_image=fmean(n for s in samples for n in s.images),
        kept_per_image=fmean(n for s in samples for n in s.kept),
        average_per_layer=fmean(per_layer),
        average_after_cuts=fmean(after_cuts(per_layer)),
        per_layer=per_layer,
        text=fmean(s.text for s in samples),
        generated=fmean(s.generated for s in samples),
    )
