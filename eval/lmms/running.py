"""One evaluation of a task by lmms-eval, whose requests are dealt to all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...adapters.family import Fit
from ...adapters.handle import Handle
from ..measure.answering import Answer
from ..measure.evaluate import EXAMPLES
from ..measure.where_kept import Seen
from ..models.picture_fit import picture_fit
from .manners import alone, cause_of, quiet_bars, seeds_kept

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance

    from .model import VlmPrune
    from .prompts import Encoded


@dataclass
class _Given:
    """What one process contributes."""

    answers: list[Answer] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    pictures: dict[int, Image.Image] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)
    modes: set[str] = field(default_factory=set)
    seen: Seen = field(default_factory=Seen)


class _Answered(Exception):
    """Ends the evaluation in a process whose answers the first one has: it alone scores."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated.

    Attributes:
        task: as lmms-eval has loaded it.
        count: so many questions, the first ones.
        timed: of them so many are measured afterwards.
        draw: whether pictures of what was kept are drawn.
    """

    lm: VlmPrune
    task: Any
    count: int
    seed: int
    timed: int
    draw: bool


class Shared:
    """One evaluation. lmms-eval sees a single process; the requests are dealt to all."""

    def __init__(self, asked: Evaluation, progress: Callable[[int], None]) -> None:
        self.asked = asked
        self.lm = asked.lm
        self.progress = progress
        self.answers: list[Answer] = []
        self.questions: dict[Any, str] = {}
        self.kept: dict[Any, int] = {}
        self.pictures: dict[int, Image.Image] = {}
        self.notes: set[str] = set()
        self.modes: set[str] = set()
        self.seen: list[Seen] = []
        self.timed: list[Instance] = []

    def evaluate(self) -> Mapping[str, Any]:
        """Results of lmms-eval; nothing in processes but the first."""
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        asked, found = self.asked, {}
        failure: Exception | None = None
        with quiet_bars(), alone(), seeds_kept():
            self.lm.generate_until = self._generate  # type: ignore[method-assign]
            try:
                found = simple_evaluate(
                    model=self.lm,
                    model_args=" ".join(map(str, self.lm.calls)) or "dense",
                    tasks=[asked.task],
                    task_manager=TaskManager(include_defaults=False),  # it is loaded already
                    batch_size=self.lm.batch_size,
                    limit=asked.count,
                    bootstrap_iters=0,
                    log_samples=True,
                    random_seed=asked.seed,
                    numpy_random_seed=asked.seed,
                    torch_random_seed=asked.seed,
                    process_docs_parallel=1,
                    distributed_executor_backend="torchrun",
                )
            except _Answered:
                pass
            except Exception as error:
                if not self.answers:  # raised in all processes
                    raise
                failure = cause_of(error)
            finally:
                del self.lm.generate_until

        def scored() -> None:
            if failure is not None:
                raise failure

        self.lm.processes.from_first(scored)
        return found

    def _generate(self, requests: list[Instance]) -> list[Any]:
        from .model import result

        shares = self.lm.processes.gather(lambda: self._share(requests))
        self.answers = self.lm.processes.dealt([share.answers for share in shares])
        questions = self.lm.processes.dealt([share.questions for share in shares])
        for request, answer, question in zip(requests, self.answers, questions, strict=True):
            self.questions[request.doc_id] = question
            self.kept[request.doc_id] = answer.kept
        for share in shares:
            self.pictures |= share.pictures
            self.notes |= share.notes
            self.modes |= share.modes
            self.seen.append(share.seen)
        self.timed = requests[: self.asked.timed]
        if not self.lm.processes.first:
            raise _Answered
        return [result(answer) for answer in self.answers]

    def _share(self, requests: list[Instance]) -> _Given:
        """The answers of this process, with pictures of what was kept of the first questions."""
        processes = self.lm.processes
        mine = list(processes.share(requests))
        numbers = {id(requests[n]): n for n in processes.share(range(len(requests)))}
        given, fit = _Given(), picture_fit(self.lm.processor)
        from .model import ignore

        def note(
            request: Instance, answer: Answer, handle: Handle | None, encoded: Encoded, row: int
        ) -> None:
            if handle is not None:
                given.notes |= {handle.last.note} if handle.last.note else set()
                given.modes |= {handle.last.positions}
                given.seen.note(handle.last, row)
            number = numbers[id(request)]
            if self.asked.draw and number < EXAMPLES and encoded.media[row]:
                given.pictures[number] = _picture(handle, encoded, row, fit)
            self.progress(processes.world)

        self.lm.on_answer = note
        try:
            given.answers = self.lm.answers(mine)
        finally:
            self.lm.on_answer = ignore
        given.questions = [_question(self.lm.chat(request)) for request in mine]
        return given


def _picture(handle: Handle | None, encoded: Encoded, row: int, fit: Fit | None) -> Image.Image:
    """The first picture of a prompt (of a video: its frames), with what was kept of it."""
    first = encoded.media[row][0]
    if handle is None or not handle.last.kept:
        return first if isinstance(first, Image.Image) else first[0]
    index = sum(len(of_row) for of_row in encoded.media[:row])
    if isinstance(first, Image.Image):
        return handle.overlay(first.convert("RGB"), index, fit=fit)
    blocks = len(handle.last.tilings[index].blocks)
    frames = [first[len(first) * block // blocks] for block in range(blocks)]
    return handle.overlay(frames, index, fit=fit, across=math.ceil(math.sqrt(blocks)))


def _question(chat: Any) -> str:
    """The text of the last message."""
    texts = [content.text for content in chat.messages[-1].content if content.type == "text"]
    return "\n".join(texts)
