"""`vlmprune sweep`: load once, run the grid on every task, then the tables and the frontiers."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ...adapters.registry import family_of
from ...prune.contract import ClipText as ClipTextSignal
from ...prune.errors import MethodFieldError
from ..arguments.config import write_config
from ..embedded.task import EmbeddedTask
from ..embedded.turns import TURNS, turns
from ..measure.evaluate import Benchmark, Evaluator
from ..measure.second_turn import SecondTurn
from ..models.loading import (
    limit_pixels,
    load,
    load_clip,
    resolve_device,
    short_name,
    split_model_args,
)
from ..models.request import ModelRequest
from ..processes import Processes
from ..results.records import Config, setting_of
from ..results.store import Store, UnwrittenError
from ..sweep.grid import REFUSALS
from ..sweep.outcome import say_interrupted, say_what_happened, show
from ..sweep.request import SweepRequest
from ..sweep.running import sweep_grid
from ..tasks.jsonl import JsonlTask
from ..tasks.protocols import Task
from ..tasks.questions import asked
from ..vocabulary_note import vocabulary_note
from ..words.depths import at_depths
from ..words.parts import Part, Parts, combined

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...adapters.clip_text import ClipText


def run(request: SweepRequest) -> int:
    """The command. Returns the exit code."""
    wanted, folder = request.model, request.output_path
    assert wanted is not None and folder is not None  # noqa: S101  (the command line gives both)
    methods = at_depths(request.methods, request.depths)
    combinations = combined(methods, request.budget_words, request.seed)
    loading, pixels = split_model_args(wanted.model_args)
    with Processes.started(cpu=wanted.device == "cpu") as processes:
        store = Store(folder) if processes.first else None
        if store is not None and request.settings is not None:
            write_config(folder, {**request.settings, **_named_tasks(request)})
        device = resolve_device(wanted.device or processes.device, may_shard=processes.world == 1)
        model, processor = load(
            wanted.name,
            dtype=wanted.dtype,
            attn_implementation=wanted.attn_implementation,
            device=device,
            **loading,
        )
        if processes.first:
            _say_what_is_lost(request.own, processor)
        clip = None
        if wanted.clip and _reads_clip(combinations, model):
            clip = load_clip(wanted.clip, processor, device=device)
        found = _benchmarks(
            request, model, processor, clip=clip, processes=processes, pixels=pixels
        )
        try:
            cells, summary = sweep_grid(
                model,
                found,
                combinations,
                request,
                name=short_name(wanted.name),
                store=store,
                processes=processes,
                given=partial(_given, request, wanted),
            )
        except KeyboardInterrupt:
            say_interrupted(folder, rerun=request.rerun)
            return 130
        except UnwrittenError as error:
            if store is not None:  # what is on no disk is at least on the screen
                show(folder, [*store.read(), error.record], {setting_of(error.record)})
            raise
        if store is not None:
            show(folder, store.read(), {cell.config.setting for cell in cells})
            say_what_happened(summary, folder)
        return 1 if summary.failed else 0


def _tasks(request: SweepRequest) -> list[str | Task]:
    return [*request.own, *request.tasks] or [EmbeddedTask().name]


def _named_tasks(request: SweepRequest) -> dict[str, list[str]]:
    named = [name for name in _tasks(request) if isinstance(name, str)]
    return {"tasks": named} if named else {}


def _given(request: SweepRequest, wanted: ModelRequest, config: Config) -> dict[str, object]:
    """The flags that a cell hangs on and that its configuration does not tell, if typed."""
    flags: dict[str, object] = {}
    if wanted.name != config.model:
        flags["model"] = wanted.name
    if wanted.clip:
        flags["clip"] = wanted.clip
    if request.include_path:
        flags["include_path"] = request.include_path
    imports = (request.settings or {}).get("imports", ())
    if imports and any("source" in method for method in config.methods):
        flags["imports"] = imports
    for task in request.own:
        if task.name == config.task:
            flags |= {"data": str(task.path), "matching": task.matching}
    return flags


def _benchmarks(
    request: SweepRequest,
    model: PreTrainedModel,
    processor: Any,
    *,
    clip: ClipText | None,
    processes: Processes,
    pixels: Mapping[str, int],
) -> list[Benchmark]:
    """Each task once: the embedded benchmarks as they are, all others through lmms-eval."""
    embedded = EmbeddedTask()
    found: list[Benchmark] = []
    for name in dict.fromkeys(_tasks(request)):
        if not isinstance(name, str) or name == embedded.name:
            task = embedded if isinstance(name, str) else name
            found.append(
                Evaluator(
                    model,
                    limit_pixels(model, processor, pixels) if pixels else processor,
                    task,
                    asked(task, request.limit, request.kinds),
                    batch_size=request.batch_size,
                    seed=request.seed,
                    clip=clip,
                    processes=processes,
                )
            )
            continue
        if request.kinds:
            raise MethodFieldError(
                f"--kinds {' '.join(request.kinds)}: only {embedded.name} and files of --data have "
                f"kinds of questions, not {name}: leave one of them out."
            )
        if name == TURNS:
            found.append(
                SecondTurn(
                    model,
                    limit_pixels(model, processor, pixels) if pixels else processor,
                    turns(request.limit),
                    batch_size=request.batch_size,
                    seed=request.seed,
                    clip=clip,
                    processes=processes,
                )
            )
            continue
        from ..lmms.benchmark import benchmarks

        found += benchmarks(
            [name],
            model,
            processor,
            include_path=request.include_path,
            limit=request.limit,
            batch_size=request.batch_size,
            seed=request.seed,
            clip=clip,
            processes=processes,
            pixels=pixels,
        )
    return found


def _reads_clip(combinations: Sequence[Parts], model: PreTrainedModel) -> bool:
    """Whether a method compares the image with the question in CLIP's space."""
    shape = family_of(model).shape

    def reads(part: Part) -> bool:
        try:
            return any(isinstance(need, ClipTextSignal) for need in part.method.needs(shape))
        except REFUSALS:  # the cell will say so
            return False

    return any(reads(part) for parts in combinations for part in parts)


def _say_what_is_lost(own: Sequence[JsonlTask], processor: Any) -> None:
    """What of files of questions is not read, by us or by the model."""
    for task in own:
        if task.unread:
            unread = ", ".join(task.unread)
            sys.stderr.write(f"note: {task.path}: keys that are not read: {unread}\n")
        if note := vocabulary_note(processor, [q.question for q in task.questions(None)]):
            sys.stderr.write(f"note: {task.path}: {note}\n")
