"""`vlmprune sweep`: load once, run the grid on every task, then the tables and the frontiers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from ..arguments.config import write_config
from ..models.loading import (
    load,
    load_clip,
    resolve_device,
    short_name,
    split_model_args,
)
from ..processes import Processes
from ..results.records import setting_of
from ..results.store import Store, UnwrittenError
from ..sweep.outcome import say_interrupted, say_what_happened, show
from ..sweep.request import SweepRequest
from ..sweep.running import sweep_grid
from ..tasks.jsonl import JsonlTask
from ..vocabulary_note import vocabulary_note
from ..words.depths import at_depths
from ..words.parts import combined
from .benchmarks import benchmarks_of, flags_of, reads_clip, tasks_of


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
        if wanted.clip and reads_clip(combinations, model):
            clip = load_clip(wanted.clip, processor, device=device)
        found = benchmarks_of(
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
                given=partial(flags_of, request, wanted),
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


def _named_tasks(request: SweepRequest) -> dict[str, list[str]]:
    named = [name for name in tasks_of(request) if isinstance(name, str)]
    return {"tasks": named} if named else {}


def _say_what_is_lost(own: Sequence[JsonlTask], processor: Any) -> None:
    """What of files of questions is not read, by us or by the model."""
    for task in own:
        if task.unread:
            unread = ", ".join(task.unread)
            sys.stderr.write(f"note: {task.path}: keys that are not read: {unread}\n")
        if note := vocabulary_note(processor, [q.question for q in task.questions(None)]):
            sys.stderr.write(f"note: {task.path}: {note}\n")
