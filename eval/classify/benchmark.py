"""A classifier on all pictures, dense or with methods inside it: the cells of its grid."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...adapters.handle import Handle
from ...adapters.patching import patch, unpatched
from ...prune.budget import MethodCall
from ...prune.contract import Positions
from ..measure.evaluate import EXAMPLES, Sample, SavePicture, example
from ..measure.times import synchronise
from ..results.records import Example, MeasuredClasses, PictureFlops, PictureTimes
from ..results.statistics import mean_score, spread
from .classifier import Classifier
from .counting import Patches, flops_of
from .pictures import Picture, Pictures

METRIC = "top-1"
_IN_TURN = 8  # so many batches are run dense as well, for times that compare


class Classification:
    """What a grid runs of a classifier: see `Benchmark`."""

    max_new_tokens = None

    def __init__(
        self, classifier: Classifier, pictures: Pictures, *, batch_size: int, seed: int = 0
    ) -> None:
        self.classifier, self.pictures = classifier, pictures
        self.batch_size, self.seed = batch_size, seed
        self.name, self.version = pictures.name, pictures.version
        self.count = len(pictures.shown)
        first = next(classifier.model.parameters())
        self.device, self.dtype = first.device, first.dtype
        named = {number: label for label, number in classifier.labels.items()}
        self._names = named | {number: label for label, number in pictures.numbers.items()}
        self._dense_flops: float | None = None

    @torch.inference_mode()
    def run(
        self,
        calls: Sequence[MethodCall] = (),
        *,
        positions: Positions | None = None,
        progress: Callable[[int], None] = lambda pictures: None,
        save_picture: SavePicture | None = None,
    ) -> tuple[MeasuredClasses, list[Sample]]:
        """All pictures, dense or with `calls`; the model is as before when this returns or raises.

        Args:
            positions: of an LLM: None.
            progress: told how many more pictures are done.
            save_picture: for pictures of what was kept of a few, at even distances.
        """
        torch.manual_seed(self.seed)
        model, on_gpu = self.classifier.model, self.device.type == "cuda"
        pass_ = _Pass(Patches(model))
        drawn = {n * self.count // EXAMPLES: n for n in range(min(EXAMPLES, self.count))}
        flops: float | None = None
        with patch(model, calls) if calls else nullcontext() as handle:
            for pixels, shown in self.pictures.batches(self.classifier, self.batch_size):
                batch = pixels.to(self.device, self.dtype)
                if flops is None:  # these passes warm up, too
                    flops = self._flops(batch, handle)
                    if on_gpu:
                        torch.cuda.reset_peak_memory_stats(self.device)
                logits = self._timed(batch, pass_)
                first = len(pass_.samples)
                self._judge(logits, shown, pass_.patches.add(batch, handle), pass_)
                for at, each in enumerate(shown):
                    if save_picture and (number := drawn.get(first + at)) is not None:
                        picture = each.open()
                        if handle is not None:
                            picture = handle.overlay(picture, at)
                        pass_.drawn[number] = save_picture(picture, number)
                if handle is not None:
                    pass_.notes |= {handle.last.note} if handle.last.note else set()
                    if len(pass_.dense_seconds) < _IN_TURN:
                        with unpatched(model):
                            pass_.dense_seconds.append(self._seconds(batch)[0] / len(batch))
                progress(len(shown))
            peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else None
        assert flops is not None  # noqa: S101  (there are pictures)
        return MeasuredClasses(
            scores={METRIC: mean_score([s.score or 0.0 for s in pass_.samples])},
            tokens=pass_.patches.found(),
            flops=PictureFlops(forward=flops, forward_share=flops / (self._dense_flops or flops)),
            times=pass_.times(),
            peak_memory_bytes=peak,
            positions=None,
            notes=sorted(pass_.notes),
            examples=self._examples(pass_, drawn),
        ), pass_.samples

    def _flops(self, batch: Tensor, handle: Handle | None) -> float:
        """Of a picture as it is run now; those of the dense model are counted once."""
        if self._dense_flops is None:
            with unpatched(self.classifier.model):
                self._dense_flops = flops_of(self.classifier, batch)
        return self._dense_flops if handle is None else flops_of(self.classifier, batch)

    def _seconds(self, batch: Tensor) -> tuple[float, Tensor]:
        synchronise(self.device)
        started = time.perf_counter()
        logits = self.classifier.logits(batch)
        synchronise(self.device)
        return time.perf_counter() - started, logits

    def _timed(self, batch: Tensor, pass_: _Pass) -> Tensor:
        seconds, logits = self._seconds(batch)
        if len(batch) == self.batch_size or not pass_.seconds:  # a last one is smaller
            pass_.seconds.append(seconds / len(batch))
        return logits

    def _judge(
        self, logits: Tensor, shown: Sequence[Picture], kept: Sequence[int], pass_: _Pass
    ) -> None:
        for at, (each, number) in enumerate(zip(shown, logits.argmax(-1).tolist(), strict=True)):
            pass_.samples.append(
                Sample(
                    id=each.id,
                    kind=each.label,
                    question=each.id,
                    answer=each.label,
                    prediction=self._names.get(number, str(number)),
                    score=float(number == self.pictures.numbers[each.label]),
                    kept=kept[at] if kept else 0,
                )
            )

    @staticmethod
    def _examples(pass_: _Pass, drawn: dict[int, int]) -> list[Example]:
        return [example(pass_.samples[at], pass_.drawn.get(n)) for at, n in drawn.items()]


@dataclass
class _Pass:
    """What is collected over all pictures; seconds are of one."""

    patches: Patches
    samples: list[Sample] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    dense_seconds: list[float] = field(default_factory=list)
    notes: set[str] = field(default_factory=set)
    drawn: dict[int, str | None] = field(default_factory=dict)

    def times(self) -> PictureTimes:
        pairs = zip(self.seconds, self.dense_seconds, strict=False)
        return PictureTimes(
            picture=spread(self.seconds),
            dense_picture=spread(self.dense_seconds),
            share_of_dense=spread([a / b for a, b in pairs]),
        )
