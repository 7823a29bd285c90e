"""Run one cell of a sweep where questions come second: another one about the same picture was asked
before, and chose what is left of it.

The cache of the first question is cut back to the end of the picture, and the second is asked on
it, as where a server shares the cache of a picture among its questions. So nothing but the choice
comes from the first turn, and what was dropped for it is not there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from ...adapters.cache_names import CACHE, cache_of
from ...adapters.clip_text import ClipText
from ...adapters.devices import input_device
from ...adapters.handle import Handle
from ...adapters.patching import patch, unpatched
from ...prune.budget import MethodCall
from ...prune.contract import Positions
from ...prune.errors import UnsupportedFeatureError
from ..embedded.task import EmbeddedTask
from ..embedded.turns import FIRST, SECOND, TURNS, VERSION, Turns
from ..processes import Processes
from ..results.records import Measured
from ..tasks.protocols import Task, TaskError
from ..words.downsample import downsampling
from .answering import Answer, answers_of
from .cell import Share, cell_of, on_device, score_of
from .evaluate import EXAMPLES, TIMED_QUESTIONS, Sample, SavePicture, example
from .flops import model_cost
from .times import Measurement, PatchOptions, measure
from .where_kept import add_where

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What came of two questions."""

    first: Answer
    second: str
    kept: frozenset[int] | None
    """Tokens that were kept for the first; None: of the dense model, and on the cache."""


@dataclass
class _Share(Share):
    asked: list[_Asked] = field(default_factory=list)


class SecondTurn:
    """The benchmark of couples of questions: every process answers its share of them."""

    name = TURNS
    version = VERSION

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        turns: Sequence[Turns],
        *,
        batch_size: int,
        seed: int = 0,
        clip: ClipText | None = None,
        processes: Processes | None = None,
    ) -> None:
        self.model = model
        self.processor = processor
        self.task: Task = EmbeddedTask()
        self.turns = turns
        self.batch_size = batch_size
        self.seed = seed
        self.clip = clip
        self.processes = processes or Processes()
        self.cost = model_cost(model)
        self.device = input_device(model)

    @property
    def max_new_tokens(self) -> int:
        return self.task.max_new_tokens

    @property
    def count(self) -> int:
        return len(self.turns)

    def run(
        self,
        calls: Sequence[MethodCall] = (),
        *,
        positions: Positions | None = None,
        progress: Callable[[int], None] = lambda questions: None,
        save_picture: SavePicture | None = None,
    ) -> tuple[Measured, list[Sample]]:
        """Ask all couples; pictures are not drawn.

        Raises:
            UnsupportedFeatureError: a method leaves a cache that cannot be cut back, or pictures
                are to be made smaller.
        """
        if downsampling(calls) is not None:
            raise UnsupportedFeatureError(
                "The second turn is asked on the tokens that the first left, which smaller "
                "pictures do not choose: leave downsample out."
            )
        torch.manual_seed(self.seed)
        options: PatchOptions = {"positions": positions, "clip": self.clip}
        with unpatched(self.model):
            done = self.processes.gather(partial(self._share, calls, options, progress))
            times = self.processes.from_first(partial(self._measure, calls, options))
        asked = self.processes.dealt([share.asked for share in done])
        evidence = self.processes.dealt([share.seen.evidence for share in done])
        firsts = [each.first for each in asked]
        samples = list(map(self._sample, self.turns, asked))
        scores = [sample.score or 0.0 for sample in samples]
        kinds = [each.kind for each in self.turns]
        first = self._asked_first(firsts)
        cell = cell_of(
            done,
            {SECOND: score_of(scores, kinds), FIRST: score_of(first, kinds)},
            firsts,
            self.cost,
            times,
            [example(sample, None) for sample in samples[:EXAMPLES]],
        )
        if calls:
            add_where(cell, [share.seen for share in done], evidence, scores)
            if (alike := _alike([each.kept for each in asked])) is not None:
                cell["kept_alike"] = alike
        return cell, samples

    def _share(
        self,
        calls: Sequence[MethodCall],
        options: PatchOptions,
        progress: Callable[[int], None],
    ) -> _Share:
        """Ask what this process is dealt, in batches of prompts of equal length: with padding in
        front, caches could not be cut back alike."""
        share = _Share()
        turns = self.processes.share(self.turns)
        alike: dict[object, list[int]] = defaultdict(list)
        for number, each in enumerate(turns):
            alike[self._lengths(each)].append(number)
        asked: dict[int, _Asked] = {}
        evidence: dict[int, float | None] = {}
        with patch(self.model, calls, **options) if calls else nullcontext() as handle:
            for numbers in alike.values():
                for start in range(0, len(numbers), self.batch_size):
                    some = numbers[start : start + self.batch_size]
                    told = self._ask([turns[n] for n in some], handle, share)
                    asked |= dict(zip(some, told, strict=True))
                    if handle is not None:
                        evidence |= dict(zip(some, share.seen.evidence[-len(some) :], strict=True))
                    progress(len(some) * self.processes.world)
        share.asked = [asked[number] for number in range(len(turns))]
        if calls:
            share.seen.evidence = [evidence[number] for number in range(len(turns))]
        return share

    @torch.inference_mode()
    def _ask(self, turns: Sequence[Turns], handle: Handle | None, share: _Share) -> list[_Asked]:
        inputs = self._encode(turns, second=False)
        ahead = self._encode(turns, second=True)["input_ids"]
        end = self._end_of_picture(inputs["input_ids"], ahead)
        how = {"do_sample": False, "max_new_tokens": self.max_new_tokens}
        output = self.model.generate(**inputs, **how, return_dict_in_generate=True)
        images = [1] * len(turns)
        firsts = answers_of(
            self.model, self.processor, inputs, output.sequences, handle, images=images
        )
        kept: list[frozenset[int] | None] = [None] * len(turns)
        if handle is not None:
            last = handle.last
            share.note(last, [each.second.evidence for each in turns])
            if last.cache_kept is None:
                kept = [frozenset(numbers.tolist()) for numbers in last.kept]
        cache = cache_of(output)
        cache.crop(end - int(cache.get_seq_length()))
        mask = torch.ones_like(ahead)
        output = self.model.generate(input_ids=ahead, attention_mask=mask, **{CACHE: cache}, **how)
        said = self.processor.batch_decode(output[:, ahead.shape[1] :], skip_special_tokens=True)
        return [
            _Asked(first=first, second=text, kept=numbers)
            for first, text, numbers in zip(firsts, said, kept, strict=True)
        ]

    def _end_of_picture(self, first: torch.Tensor, second: torch.Tensor) -> int:
        """The column behind the picture, up to which both prompts are the same.

        Raises:
            TaskError: they are not.
        """
        token = self.model.config.image_token_id
        end = int((first[0] == token).nonzero()[-1]) + 1
        if not torch.equal(first[:, :end], second[:, :end]):
            raise TaskError(
                f"{self.name} asks again on the cache of a picture, and this model's prompt has "
                f"words of the question in front of it: its second turn cannot be asked so."
            )
        return end

    def _lengths(self, turns: Turns) -> tuple[object, ...]:
        prompts = (self.task.prompt(self.processor, q) for q in (turns.first, turns.second))
        lengths = (len(self.processor.tokenizer(text)["input_ids"]) for text in prompts)
        return (*lengths, turns.first.image.size)

    def _encode(self, turns: Sequence[Turns], *, second: bool) -> dict[str, Any]:
        asked = [each.second if second else each.first for each in turns]
        inputs = self.processor(
            text=[self.task.prompt(self.processor, question) for question in asked],
            images=[question.image for question in asked],
            return_tensors="pt",
        )
        return on_device(inputs, self.device, self.model.dtype)

    def _measure(self, calls: Sequence[MethodCall], options: PatchOptions) -> Measurement:
        few = [self._encode([each], second=False) for each in self.turns[:TIMED_QUESTIONS]]
        return measure(self.model, few, calls=calls, options=options)

    def _sample(self, turns: Turns, asked: _Asked) -> Sample:
        return Sample(
            id=turns.id,
            kind=turns.kind,
            question=f"{turns.first.question} Then: {turns.second.question}",
            answer=turns.second.answer,
            prediction=asked.second.strip(),
            score=float(self.task.is_correct(asked.second, turns.second)),
            kept=asked.first.kept,
        )

    def _asked_first(self, answers: Sequence[Answer]) -> list[float]:
        """How each second question was answered where it came first, in the other order."""
        right = {
            turns.first.id: float(self.task.is_correct(answer.text, turns.first))
            for turns, answer in zip(self.turns, answers, strict=True)
        }
        return [right[turns.second.id] for turns in self.turns]


def _alike(kept: Sequence[frozenset[int] | None]) -> float | None:
    """Which share of tokens was kept for either question of a couple, the mean over couples; None
    where it is not known."""
    shares = [
        len(one & other) / max(len(one), len(other), 1)
        for one, other in zip(kept[::2], kept[1::2], strict=True)
        if one is not None and other is not None
    ]
    return fmean(shares) if shares else None
