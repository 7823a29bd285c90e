"""Tasks of lmms-eval as benchmarks of a sweep: in this process, on a model that is loaded once."""

from __future__ import annotations

import contextlib
import math
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from ...adapters.clip_text import ClipText
from ...adapters.overlay import _GAP as PANEL_GAP
from ...adapters.patching import Handle
from ...prune.budget import MethodCall
from ...prune.contract import Positions
from ...prune.errors import VlmpruneError, did_you_mean
from ..answering import Answer, flops_of, tokens_of
from ..evaluate import EXAMPLES, TIMED_QUESTIONS, Sample, SavePicture, example
from ..flops import model_cost
from ..measure import Measurement, measure
from ..processes import Processes
from ..results import Measured
from ..task import TaskError
from ..tasks import TASKS_DIR

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from transformers import PreTrainedModel

    from .model import VlmPrune
    from .prompts import Encoded


class MissingLmmsError(VlmpruneError, ImportError):
    """lmms-eval is not installed."""


def benchmarks(
    names: Sequence[str],
    model: PreTrainedModel,
    processor: Any,
    *,
    include_path: str | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
    clip: ClipText | None = None,
    processes: Processes | None = None,
) -> list[LmmsBenchmark]:
    """The tasks of these names, those of groups one by one.

    Args:
        include_path: a folder with further tasks.
        limit: only the first questions of each task.

    Raises:
        MissingLmmsError: lmms-eval is not installed.
        TaskError: no task has this name, or it is of a kind that cannot be run here.
    """
    with _to_stderr():
        try:
            import lmms_eval.models  # noqa: F401
        except ImportError as error:
            raise MissingLmmsError(
                f"Tasks {', '.join(names)}: they are run by lmms-eval, which cannot be imported "
                f"({error}): pip install 'vlmprune[lmms]'."
            ) from error
        from .model import VlmPrune

        processes = processes or Processes()
        lm = VlmPrune.of(
            model,
            processor,
            batch_size=batch_size,
            clip=clip,
            processes=processes,
        )
        tasks: dict[str, Any] = {}

        def load() -> None:
            tasks.update(_tasks(names, lm.wrapper, include_path))

        processes.from_first(load)  # it fills the cache of data sets
        if not processes.first:
            load()
    return [LmmsBenchmark(lm, name, task, limit=limit, seed=seed) for name, task in tasks.items()]


def _tasks(names: Sequence[str], wrapper: str, include_path: str | None) -> dict[str, Any]:
    """Loaded tasks by name."""
    from lmms_eval.tasks import TaskManager, get_task_dict

    folders = [str(TASKS_DIR), *([include_path] if include_path else [])]
    manager = TaskManager(include_path=folders, include_defaults=False, model_name=wrapper)
    if not all(name in manager.all_subtasks for name in names):  # indexing the others takes long
        manager = TaskManager(include_path=folders, model_name=wrapper)
    for name in names:
        if name not in manager.all_tasks:
            raise TaskError(f"Unknown task {name!r}. {_nearest(name, manager.all_tasks)}")
    found: dict[str, Any] = {}
    for name in names:
        try:
            with _data_bars():
                found |= _leaves(get_task_dict([name], manager, "chat"))
        except Exception as error:
            cause = _cause(error)
            away = (
                " Most tasks read data from the Hugging Face Hub: go online, log in (hf auth login)"
                ", or give tasks on local data with --include_path."
            )
            raise TaskError(
                f"Task {name!r} cannot be loaded: {type(cause).__name__}: {cause}."
                f"{away if isinstance(cause, OSError) else ''}"
            ) from cause
    for name, task in found.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise TaskError(
                f"Task {name!r} is of type {task.OUTPUT_TYPE}: only tasks that generate one answer "
                f"(generate_until) can be run."
            )
    return found


def _nearest(name: str, known: Sequence[str]) -> str:
    """The nearest names; all of them would be thousands."""
    hint = did_you_mean(name, known).partition("Available:")[0]
    return f"{hint}`lmms-eval --tasks list` lists all; --include_path DIR adds your own."


def _leaves(tasks: Mapping[Any, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tasks.items():
        found |= _leaves(value) if isinstance(value, Mapping) else {str(name): value}
    return found


class LmmsBenchmark:
    """One task of lmms-eval; see `evaluate.Benchmark`. Every process answers its share."""

    def __init__(
        self,
        lm: VlmPrune,
        name: str,
        task: Any,
        *,
        limit: int | None = None,
        seed: int = 0,
        timed_questions: int = TIMED_QUESTIONS,
    ) -> None:
        from .scores import Scores
        from .version import version_of

        total = len(task.eval_docs)
        self.lm = lm
        self.name = name
        self.task = task
        self.version = version_of(task, total)
        self.count = total if limit is None else min(limit, total)
        self.max_new_tokens = lm.new_tokens(task.config.generation_kwargs)
        self.seed = seed
        self.timed_questions = timed_questions
        self.cost = model_cost(lm.model)
        self._scores = Scores(task)

    def run(
        self,
        calls: Sequence[MethodCall] = (),
        *,
        positions: Positions | None = None,
        progress: Callable[[int], None] = lambda questions: None,
        save_picture: SavePicture | None = None,
    ) -> tuple[Measured, list[Sample]]:
        """Evaluate the dense model, or what `calls` make of it; see `evaluate.Benchmark`."""
        lm, processes = self.lm, self.lm.processes
        lm.use(calls, positions)
        lm.task_dict[self.name] = self.task.dataset
        runner = _Shared(self, progress, draw=save_picture is not None)
        results = runner.evaluate()
        answers = runner.answers
        measured = processes.from_first(lambda: self._measure(runner.timed))
        scores, samples = processes.from_first(lambda: self._read(results, runner))
        paths: dict[int, str] = {}
        if save_picture is not None and processes.first:
            paths = {n: save_picture(picture, n) for n, picture in runner.pictures.items()}
        return Measured(
            scores=scores,
            tokens=tokens_of(answers),
            flops=flops_of(answers, self.cost),
            times=measured.timings.summary(),
            kv_bytes=measured.kv_bytes,
            peak_memory_bytes=measured.peak_memory_bytes,
            positions=" ".join(sorted(runner.modes)) or None,
            notes=sorted(runner.notes),
            examples=[example(s, paths.get(n)) for n, s in enumerate(samples[:EXAMPLES])],
        ), samples

    def _measure(self, requests: Sequence[Instance]) -> Measurement:
        inputs = [self.lm.inputs([request]).inputs for request in requests]
        return measure(self.lm.model, inputs, calls=self.lm.calls, options=self.lm.options)

    def _read(
        self, results: Mapping[str, Any], runner: _Shared
    ) -> tuple[dict[str, Any], list[Sample]]:
        from .scores import single_score

        logged = results["samples"][self.name]
        of_task = results["results"][self.name]
        metrics = self.task.aggregation()
        filters = list(dict.fromkeys(k.partition(",")[2] for k in of_task if "," in k))
        filters = [f for f in filters if any(f"{metric},{f}" in of_task for metric in metrics)]
        per_filter = len(logged) // max(1, len(filters))  # filter by filter, in order of questions
        items = {
            f"{metric},{name}": [entry[metric] for entry in part if metric in entry]
            for number, name in enumerate(filters)
            for part in [logged[number * per_filter : (number + 1) * per_filter]]
            for metric in metrics
            if any(metric in entry for entry in part)
        }
        scores = self._scores.read(of_task, items)
        if not scores:
            raise TaskError(
                f"Task {self.name!r} gave no score: its metrics "
                f"({', '.join(metrics)}) are computed elsewhere, e.g. by a server that takes a "
                f"file of answers."
            )
        samples = [
            Sample(
                id=entry["doc_id"],
                kind="",
                question=runner.questions[entry["doc_id"]],
                answer=_text(entry["target"]),
                prediction=_text(entry["filtered_resps"][0]),
                score=single_score(list(metrics), entry),
                kept=runner.kept[entry["doc_id"]],
            )
            for entry in logged[:per_filter]
        ]
        return scores, samples


@dataclass
class _Given:
    """What one process contributes."""

    answers: list[Answer] = field(default_factory=list)
    questions: list[str] = field(default_factory=list)
    pictures: dict[int, Image.Image] = field(default_factory=dict)
    notes: set[str] = field(default_factory=set)
    modes: set[str] = field(default_factory=set)


class _Answered(Exception):
    """Ends the evaluation in a process whose answers the first one has: it alone scores."""


class _Shared:
    """One evaluation. lmms-eval sees a single process; the requests are dealt to all."""

    def __init__(
        self, benchmark: LmmsBenchmark, progress: Callable[[int], None], *, draw: bool
    ) -> None:
        self.benchmark = benchmark
        self.lm = benchmark.lm
        self.progress = progress
        self.draw = draw
        self.answers: list[Answer] = []
        self.questions: dict[Any, str] = {}
        self.kept: dict[Any, int] = {}
        self.pictures: dict[int, Image.Image] = {}
        self.notes: set[str] = set()
        self.modes: set[str] = set()
        self.timed: list[Instance] = []

    def evaluate(self) -> Mapping[str, Any]:
        """Results of lmms-eval; nothing in processes but the first."""
        from lmms_eval.evaluator import simple_evaluate
        from lmms_eval.tasks import TaskManager

        benchmark, found = self.benchmark, {}
        failure: Exception | None = None
        with _quiet_bars(), _alone(), _seeds_kept():
            self.lm.generate_until = self._generate  # type: ignore[method-assign]
            try:
                found = simple_evaluate(
                    model=self.lm,
                    model_args=" ".join(map(str, self.lm.calls)) or "dense",
                    tasks=[benchmark.task],
                    task_manager=TaskManager(include_defaults=False),  # it is loaded already
                    batch_size=self.lm.batch_size,
                    limit=benchmark.count,
                    bootstrap_iters=0,
                    log_samples=True,
                    random_seed=benchmark.seed,
                    numpy_random_seed=benchmark.seed,
                    torch_random_seed=benchmark.seed,
                    process_docs_parallel=1,
                    distributed_executor_backend="torchrun",
                )
            except _Answered:
                pass
            except Exception as error:
                if not self.answers:  # raised in all processes
                    raise
                failure = _cause(error)
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
        self.timed = requests[: self.benchmark.timed_questions]
        if not self.lm.processes.first:
            raise _Answered
        return [result(answer) for answer in self.answers]

    def _share(self, requests: list[Instance]) -> _Given:
        """The answers of this process, with pictures of what was kept of the first questions."""
        processes = self.lm.processes
        mine = list(processes.share(requests))
        numbers = {id(requests[n]): n for n in processes.share(range(len(requests)))}
        given = _Given()
        from .model import ignore

        def note(
            request: Instance, answer: Answer, handle: Handle | None, encoded: Encoded, row: int
        ) -> None:
            if handle is not None:
                given.notes |= {handle.last.note} if handle.last.note else set()
                given.modes |= {handle.last.positions}
            number = numbers[id(request)]
            if self.draw and number < EXAMPLES and encoded.media[row]:
                given.pictures[number] = _picture(handle, encoded, row)
            self.progress(processes.world)

        self.lm.on_answer = note
        try:
            given.answers = self.lm.answers(mine)
        finally:
            self.lm.on_answer = ignore
        given.questions = [_question(self.lm.chat(request)) for request in mine]
        return given


def _picture(handle: Handle | None, encoded: Encoded, row: int) -> Image.Image:
    """The first picture of a prompt (of a video: its frames), with what was kept of it."""
    first = encoded.media[row][0]
    if handle is None or not handle.last.kept:
        return first if isinstance(first, Image.Image) else first[0]
    index = sum(len(of_row) for of_row in encoded.media[:row])
    if isinstance(first, Image.Image):
        return handle.overlay(first.convert("RGB"), index)
    blocks = len(handle.last.tilings[index].blocks)
    frames = [first[len(first) * block // blocks] for block in range(blocks)]
    return _in_rows(handle.overlay(frames, index), blocks)


def _in_rows(picture: Image.Image, panels: int) -> Image.Image:
    """Panels that stand side by side, in as many rows as columns."""
    width = (picture.width + PANEL_GAP) // panels
    columns = math.ceil(math.sqrt(panels))
    rows = math.ceil(panels / columns)
    height = picture.height + PANEL_GAP
    size = columns * width - PANEL_GAP, rows * height - PANEL_GAP
    found = Image.new("RGB", size, "white")
    for panel in range(panels):
        left = panel * width
        part = picture.crop((left, 0, left + width - PANEL_GAP, picture.height))
        found.paste(part, (panel % columns * width, panel // columns * height))
    return found


def _question(chat: Any) -> str:
    """The text of the last message."""
    texts = [content.text for content in chat.messages[-1].content if content.type == "text"]
    return "\n".join(texts)


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else str(value)


def _cause(error: Exception) -> Exception:
    """What was behind it when lmms-eval gave up trying again."""
    from tenacity import RetryError

    if isinstance(error, RetryError):
        cause = error.last_attempt.exception()
        if isinstance(cause, Exception):
            return cause
    return error


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """lmms-eval reads from the environment which process of how many it is: the only one."""
    import os

    said = {name: os.environ.pop(name, None) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in said.items() if value is not None})


@contextlib.contextmanager
def _seeds_kept() -> Iterator[None]:
    """lmms-eval sets the seeds of the process: the caller gets its own back."""
    import numpy as np

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def _quiet_bars() -> Iterator[None]:
    """Without lmms-eval's bars: the sweep has its own."""
    import lmms_eval.api.task as building
    import lmms_eval.evaluator as evaluating

    modules: list[Any] = [building, evaluating]
    bars = [module.tqdm for module in modules]

    def silent(*args: Any, **options: Any) -> Any:
        return bars[0](*args, **(options | {"disable": True}))

    try:
        for module in modules:
            module.tqdm = silent
        yield
    finally:
        for module, bar in zip(modules, bars, strict=True):
            module.tqdm = bar


@contextlib.contextmanager
def _data_bars() -> Iterator[None]:
    """Bars of data sets only on a terminal."""
    import datasets

    change = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if change:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if change:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _to_stderr() -> Iterator[None]:
    """Warnings of lmms-eval go to stderr, as its logger takes what is stdout when it is imported:
    there, only results are printed."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
