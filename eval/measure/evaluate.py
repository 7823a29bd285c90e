"""Run one cell of a sweep: answers on a benchmark, tokens, FLOPs, times and cache of one method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from ...adapters.clip_text import ClipText
from ...adapters.devices import input_device
from ...adapters.handle import Handle
from ...adapters.patching import patch, unpatched
from ...adapters.registry import family_of
from ...prune.budget import MethodCall
from ...prune.contract import Positions
from ..models.picture_fit import picture_fit
from ..models.registry import eval_family
from ..models.smaller import Smaller
from ..processes import Processes
from ..results.records import Example, Measured, MeasuredClasses
from ..tasks.protocols import Question, Task
from ..tasks.version import version_of
from ..words.downsample import downsampling, wanted_count
from .answering import Answer, answer, wholes
from .cell import Share, cell_of, on_device, score_of
from .flops import model_cost
from .times import Measurement, PatchOptions, measure
from .where_kept import add_where

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIMED_QUESTIONS = 8
EXAMPLES = 4
_CACHED_BYTES = 2**30  # encoded questions are kept between cells up to this size

SavePicture = Callable[[Image.Image, int], str | None]
"""Stores the picture of an example by its number and says where, None if the disk does not take it;
only the first process does."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One answered question, as the samples' file holds it."""

    id: str | int
    kind: str
    question: str
    answer: str
    prediction: str
    score: float | None
    kept: int
    """Rows alive after the last cut."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Benchmark(Protocol):
    """A task with a loaded model that is asked its questions, cell after cell."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def max_new_tokens(self) -> int | None:
        """None where no answers are written."""
        ...

    @property
    def count(self) -> int:
        """Questions, or pictures."""
        ...

    def run(
        self,
        calls: Sequence[MethodCall] = (),
        *,
        positions: Positions | None = None,
        progress: Callable[[int], None] = ...,
        save_picture: SavePicture | None = None,
    ) -> tuple[Measured | MeasuredClasses, list[Sample]]:
        """Evaluate the dense model, or what `calls` make of it.

        Args:
            progress: told how many more questions are answered.
            save_picture: for pictures of what was kept of the first few questions' images.
        """
        ...


@dataclass
class _Share(Share):
    answers: list[Answer] = field(default_factory=list)
    pictures: dict[int, Image.Image] = field(default_factory=dict)


class Evaluator:
    """The benchmark of a `Task`: every process answers its share of the questions."""

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
        processes: Processes | None = None,
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
        self.processes = processes or Processes()
        self.cost = model_cost(model)
        self.device = input_device(model)
        self._encoded: dict[tuple[str | int, ...], Any] = {}
        self._encoded_bytes = 0

    @property
    def name(self) -> str:
        return self.task.name

    @cached_property
    def version(self) -> str:
        return version_of(self.task, self.questions)

    @property
    def max_new_tokens(self) -> int:
        return self.task.max_new_tokens

    @property
    def count(self) -> int:
        return len(self.questions)

    def run(
        self,
        calls: Sequence[MethodCall] = (),
        *,
        positions: Positions | None = None,
        progress: Callable[[int], None] = lambda questions: None,
        save_picture: SavePicture | None = None,
        inspect: Callable[[Handle], None] = lambda handle: None,
    ) -> tuple[Measured, list[Sample]]:
        """Evaluate the dense model, or what `calls` make of it or of its pictures; see `Benchmark`.

        Args:
            inspect: given the handle after the last batch of this process.
        """
        import torch

        torch.manual_seed(self.seed)
        seen, calls = self._seen(calls)
        options: PatchOptions = {"positions": positions, "clip": self.clip}
        drawn = EXAMPLES if save_picture else 0
        ready = seen.on(family_of(self.model).vision_tower) if seen else nullcontext()
        with unpatched(self.model), ready:  # a patch of the caller's comes back afterwards
            done = self.processes.gather(
                partial(self._share, seen, calls, options, drawn, progress, inspect)
            )
            measured = self.processes.from_first(partial(self._measure, seen, calls, options))
        answers = self.processes.dealt([share.answers for share in done])
        samples = [
            self._sample(question, found)
            for question, found in zip(self.questions, answers, strict=True)
        ]
        outcomes = [sample.score or 0.0 for sample in samples]
        score = score_of(outcomes, [sample.kind for sample in samples])
        examples = self._examples(samples, done, save_picture)
        cell = cell_of(done, {"accuracy": score}, answers, self.cost, measured, examples)
        if calls:
            evidence = self.processes.dealt([share.seen.evidence for share in done])
            kept = [share.seen for share in done]
            add_where(cell, kept, evidence, [sample.score for sample in samples])
        return cell, samples

    def _seen(self, calls: Sequence[MethodCall]) -> tuple[Smaller | None, Sequence[MethodCall]]:
        """How pictures are made smaller (None: they are not), and what the model is patched with.

        Raises:
            UnsupportedModelError, UnsupportedFeatureError: they cannot be, or not so.
        """
        call = downsampling(calls)
        if call is None:
            return None, calls
        config = self.model.config
        family = eval_family(config.model_type, "No way to make pictures smaller is known")
        count = wanted_count(call, family_of(self.model).shape)
        return family.smaller(config, self.processor, count), ()

    def _share(
        self,
        seen: Smaller | None,
        calls: Sequence[MethodCall],
        options: PatchOptions,
        drawn: int,
        progress: Callable[[int], None],
        inspect: Callable[[Handle], None],
    ) -> _Share:
        """Answer what this process is dealt, and draw what was kept for the first questions."""
        share = _Share()
        share.notes |= {seen.note} if seen is not None and seen.note else set()
        questions = self.processes.share(self.questions)
        numbers = self.processes.share(range(len(self.questions)))
        fit = picture_fit(self.processor)
        with patch(self.model, calls, **options) if calls else nullcontext() as handle:
            for start in range(0, len(questions), self.batch_size):
                asked = questions[start : start + self.batch_size]
                images = [1] * len(asked)
                answers = answer(
                    self.model,
                    self.processor,
                    self._encode(asked, seen),
                    handle,
                    images=images,
                    do_sample=False,
                    max_new_tokens=self.task.max_new_tokens,
                )
                if seen is not None:
                    before = wholes(self.model, self._encode(asked), images)
                    answers = [a.beside(w) for a, w in zip(answers, before, strict=True)]
                share.answers += answers
                if handle is not None:
                    evidence = [getattr(question, "evidence", None) for question in asked]
                    share.note(handle.last, evidence)
                for index, question in enumerate(asked):
                    if (number := numbers[start + index]) < drawn:
                        share.pictures[number] = (
                            handle.overlay(question.image, index, fit=fit)
                            if handle
                            else seen.picture(question.image)
                            if seen
                            else question.image
                        )
                progress(len(asked) * self.processes.world)
            if handle is not None:
                inspect(handle)
        return share

    def _measure(
        self, seen: Smaller | None, calls: Sequence[MethodCall], options: PatchOptions
    ) -> Measurement:
        few = self.questions[: self.timed_questions]
        return measure(
            self.model,
            [self._encode([question], seen) for question in few] * self.repeats,
            calls=calls,
            options=options,
            beside=[self._encode([question]) for question in few] * self.repeats if seen else None,
        )

    def _encode(self, asked: Sequence[Question], seen: Smaller | None = None) -> dict[str, Any]:
        """The model's inputs, left-padded; with `seen`, of smaller pictures, which are not kept."""
        if seen is not None:
            return on_device(self._processed(asked, seen), self.device, self.model.dtype)
        key = tuple(question.id for question in asked)
        if key not in self._encoded:
            inputs = self._processed(asked, Smaller(processor=self.processor))
            size = sum(t.numel() * t.element_size() for t in inputs.values())
            if self._encoded_bytes + size > _CACHED_BYTES:
                return on_device(inputs, self.device, self.model.dtype)
            self._encoded[key] = inputs
            self._encoded_bytes += size
        return on_device(self._encoded[key], self.device, self.model.dtype)

    def _processed(self, asked: Sequence[Question], seen: Smaller) -> dict[str, Any]:
        return dict(
            seen.processor(
                text=[self.task.prompt(seen.processor, q) for q in asked],
                images=[[seen.picture(q.image)] for q in asked],  # those of each prompt
                padding=True,
                padding_side="left",
                return_tensors="pt",
            )
        )

    def _sample(self, question: Question, found: Answer) -> Sample:
        return Sample(
            id=question.id,
            kind=question.kind,
            question=question.question,
            answer=question.answer,
            prediction=found.text.strip(),
            score=float(self.task.is_correct(found.text, question)),
            kept=found.kept,
        )

    def _examples(
        self, samples: Sequence[Sample], done: Sequence[_Share], save_picture: SavePicture | None
    ) -> list[Example]:
        paths: dict[int, str | None] = {}
        if save_picture is not None and self.processes.first:
            for share in done:
                paths |= {n: save_picture(picture, n) for n, picture in share.pictures.items()}
        return [example(sample, paths.get(n)) for n, sample in enumerate(samples[:EXAMPLES])]


def example(sample: Sample, picture: str | None) -> Example:
    """A sample with the picture of what was kept for it."""
    return Example(
        id=sample.id,
        question=sample.question,
        answer=sample.answer,
        prediction=sample.prediction,
        score=sample.score,
        picture=picture,
    )
