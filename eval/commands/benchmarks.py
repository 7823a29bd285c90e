"""The benchmarks that a sweep asks a loaded model, and what its cells hang on besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...adapters.registry import family_of
from ...prune.contract import ClipText as ClipTextSignal
from ...prune.errors import MethodFieldError
from ..embedded import TASK
from ..embedded.task import shipped_tasks
from ..embedded.turns import TURNS, turns
from ..measure.evaluate import Benchmark, Evaluator
from ..measure.second_turn import SecondTurn
from ..models.loading import limit_pixels
from ..models.request import ModelRequest
from ..processes import Processes
from ..results.records import Config
from ..sweep.grid import REFUSALS
from ..sweep.request import SweepRequest
from ..tasks.protocols import Task
from ..tasks.questions import asked
from ..words.parts import Part, Parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...adapters.clip_text import ClipText


def tasks_of(request: SweepRequest) -> list[str | Task]:
    return [*request.own, *request.tasks] or [TASK]


def benchmarks_of(
    request: SweepRequest,
    model: PreTrainedModel,
    processor: Any,
    *,
    clip: ClipText | None,
    processes: Processes,
    pixels: Mapping[str, int],
) -> list[Benchmark]:
    """Each task once: the embedded benchmarks as they are, all others through lmms-eval."""
    shipped = shipped_tasks()
    found: list[Benchmark] = []
    for name in dict.fromkeys(tasks_of(request)):
        if not isinstance(name, str) or name in shipped:
            task = shipped[name] if isinstance(name, str) else name
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
                f"--kinds {' '.join(request.kinds)}: only {TASK} and files of --data have kinds "
                f"of questions, not {name}: leave one of them out."
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


def reads_clip(combinations: Sequence[Parts], model: PreTrainedModel) -> bool:
    """Whether a method compares the image with the question in CLIP's space."""
    shape = family_of(model).shape

    def reads(part: Part) -> bool:
        try:
            return any(isinstance(need, ClipTextSignal) for need in part.method.needs(shape))
        except REFUSALS:  # the cell will say so
            return False

    return any(reads(part) for parts in combinations for part in parts)


def flags_of(request: SweepRequest, wanted: ModelRequest, config: Config) -> dict[str, object]:
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
