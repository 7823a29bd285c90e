"""Tasks of lmms-eval as benchmarks of a sweep: in this process, on a model that is loaded once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...adapters.clip_text import ClipText
from ...prune.budget import MethodCall
from ...prune.contract import Positions
from ...prune.errors import UnsupportedFeatureError, VlmpruneError, did_you_mean
from ..measure.answering import flops_of, tokens_of
from ..measure.evaluate import EXAMPLES, TIMED_QUESTIONS, Sample, SavePicture, example
from ..measure.flops import model_cost
from ..measure.times import Measurement, measure
from ..measure.where_kept import add_where
from ..processes import Processes
from ..results.records import Measured
from ..tasks import TASKS_DIR
from ..tasks.protocols import TaskError
from ..words.downsample import downsampling
from .manners import cause_of, data_bars, to_stderr
from .running import Evaluation, Shared

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from transformers import PreTrainedModel

    from .model import VlmPrune


class MissingLmmsError(VlmpruneError, ImportError):
    """lmms-eval is not installed.

    Symptom: `sweep --tasks gqa` stops, while `tinyscenes` runs.
    Cause: all tasks but the embedded one are those of lmms-eval.
    Type: `pip install 'vlmprune[lmms]'`.
    Page: ERRORS.md#missinglmmserror
    """


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
    pixels: Mapping[str, int] | None = None,
) -> list[LmmsBenchmark]:
    """The tasks of these names, those of groups one by one.

    Args:
        include_path: a folder with further tasks.
        limit: only the first questions of each task.
        pixels: `min_pixels` and `max_pixels` of a picture, where not those of the wrapper.

    Raises:
        MissingLmmsError: lmms-eval is not installed.
        TaskError: no task has this name, or it is of a kind that cannot be run here.
    """
    with to_stderr():
        try:
            import lmms_eval.models  # noqa: F401
        except ImportError as error:
            raise MissingLmmsError(
                f"Tasks {', '.join(names)}: they are run by lmms-eval, which cannot be imported "
                f"({error}): pip install 'vlmprune[lmms]'."
            ) from error
        from .model import VlmPrune, as_wrapper_scales

        processes = processes or Processes()
        lm = VlmPrune.of(
            model,
            as_wrapper_scales(model, processor, pixels or {}),
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
    return [
        LmmsBenchmark(lm, name, task, limit=limit, seed=seed, shipped=shipped)
        for name, (task, shipped) in tasks.items()
    ]


def _tasks(
    names: Sequence[str], wrapper: str, include_path: str | None
) -> dict[str, tuple[Any, bool]]:
    """Loaded tasks by name, and whether lmms-eval or this package ships them."""
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
            with data_bars():
                found |= _leaves(get_task_dict([name], manager, "chat"))
        except Exception as error:
            cause = cause_of(error)
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
    return {name: (task, _is_shipped(manager.task_index.get(name))) for name, task in found.items()}


def _is_shipped(entry: Mapping[str, Any] | None) -> bool:
    """By where its YAML is; a task without one of its own is part of somebody's group."""
    import lmms_eval.tasks

    file = Path(str((entry or {}).get("yaml_path", ""))).resolve()
    homes = (TASKS_DIR, Path(str(lmms_eval.tasks.__file__)).parent)
    return any(file.is_relative_to(home.resolve()) for home in homes)


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
        shipped: bool = False,
    ) -> None:
        from .scores import Scores
        from .version import version_of

        total = len(task.eval_docs)
        self.lm = lm
        self.name = name
        self.task = task
        self.count = total if limit is None else min(limit, total)
        self.version = version_of(task, total, asked=0 if shipped else self.count)
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
        if downsampling(calls) is not None:
            raise UnsupportedFeatureError(
                f"downsample on {self.name}: tasks of lmms-eval read pictures by themselves; it is "
                f"measured on tinyscenes and on your own questions (--data)."
            )
        lm, processes = self.lm, self.lm.processes
        lm.use(calls, positions)
        lm.task_dict[self.name] = self.task.dataset
        asked = Evaluation(
            lm=lm,
            task=self.task,
            count=self.count,
            seed=self.seed,
            timed=self.timed_questions,
            draw=save_picture is not None,
        )
        runner = Shared(asked, progress)
        results = runner.evaluate()
        answers = runner.answers
        measured = processes.from_first(lambda: self._measure(runner.timed))
        scores, samples = processes.from_first(lambda: self._read(results, runner))
        paths: dict[int, str | None] = {}
        if save_picture is not None and processes.first:
            paths = {n: save_picture(picture, n) for n, picture in runner.pictures.items()}
        cell = Measured(
            scores=scores,
            tokens=tokens_of(answers),
            flops=flops_of(answers, self.cost),
            times=measured.timings.summary(),
            kv_bytes=measured.kv_bytes,
            peak_memory_bytes=measured.peak_memory_bytes,
            positions=" ".join(sorted(runner.modes)) or None,
            notes=sorted(runner.notes),
            examples=[example(s, paths.get(n)) for n, s in enumerate(samples[:EXAMPLES])],
        )
        add_where(cell, runner.seen, (), ())
        return cell, samples

    def _measure(self, requests: Sequence[Instance]) -> Measurement:
        inputs = [self.lm.inputs([request]).inputs for request in requests]
        return measure(self.lm.model, inputs, calls=self.lm.calls, options=self.lm.options)

    def _read(
        self, results: Mapping[str, Any], runner: Shared
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


def _text(value: Any) -> str:
    return value.strip() if isinstance(value, str) else str(value)
