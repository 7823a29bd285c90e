"""`vlmprune tune`: load once, search by successive halving, then the recommendation."""

from __future__ import annotations

import dataclasses
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from ..arguments.tune import TuneRequest
from ..console import stdout
from ..extras import Extras
from ..models.loading import load, load_clip, resolve_device, short_name, split_model_args
from ..processes import Processes
from ..results.records import Record
from ..results.store import Store
from ..sweep.request import SweepRequest
from ..sweep.running import sweep_grid
from ..tune.halving import Search, halve
from ..tune.outcome import final_order, patch_line, recommendation, search_table
from ..tune.target import Target
from ..words.parts import Parts, combined
from ..words.said import parts_text
from .benchmarks import benchmarks_of, flags_of, reads_clip

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ...adapters.clip_text import ClipText


def run(request: TuneRequest) -> int:
    """The command. Returns the exit code."""
    sweep, target = request.sweep, Target.parse(request.target)
    wanted, folder, most = sweep.model, sweep.output_path, sweep.limit
    assert wanted is not None and folder is not None and most is not None  # noqa: S101
    found = combined(sweep.methods, sweep.budget_words, sweep.seed)
    parts_of = {parts_text(parts, sweep.seed): parts for parts in found if parts}
    loading, pixels = split_model_args(wanted.model_args)
    store, device = Store(folder), resolve_device(wanted.device)
    model, processor = load(
        wanted.name,
        dtype=wanted.dtype,
        attn_implementation=wanted.attn_implementation,
        device=device,
        **loading,
    )
    needed = wanted.clip if wanted.clip and reads_clip(found, model) else None
    clip = load_clip(needed, processor, device=device) if needed else None
    cells = _Cells(model, processor, clip, sweep, parts_of, store, pixels)
    most = min(most, cells.count(most))
    try:
        search = halve(list(parts_of), most, cells, target, seconds=60 * request.minutes)
    except KeyboardInterrupt:
        sys.stderr.write(f"interrupted: the same command goes on with what is in {folder}\n")
        return 130
    _say(search, target, cells)
    return 0 if final_order(search.last, target) else 1


class _Cells:
    """Runs a candidate on so many questions, or finds it finished in the folder."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        clip: ClipText | None,
        sweep: SweepRequest,
        parts_of: dict[str, Parts],
        store: Store,
        pixels: dict[str, int],
    ) -> None:
        self.model, self.processor, self.clip = model, processor, clip
        self.sweep, self.parts_of, self.store, self.pixels = sweep, parts_of, store, pixels
        self.refused: dict[str, Record] = {}
        self._benchmarks: dict[int, list[Any]] = {}

    def count(self, questions: int) -> int:
        """Questions that there are, up to so many."""
        return sum(benchmark.count for benchmark in self._of(questions))

    def __call__(self, word: str, questions: int) -> Record:
        wanted = self.sweep.model
        assert wanted is not None  # noqa: S101
        cells, _ = sweep_grid(
            self.model,
            self._of(questions),
            [self.parts_of[word] if word else ()],
            dataclasses.replace(self.sweep, limit=questions),
            name=short_name(wanted.name),
            store=self.store,
            given=partial(flags_of, self.sweep, wanted),
        )
        (record,) = (r for r in self.store.read() if r["id"] == cells[0].config.id)
        if record["status"] != "ok":
            self.refused[word] = record
        return record

    def _of(self, questions: int) -> list[Any]:
        if questions not in self._benchmarks:
            self._benchmarks = {
                questions: benchmarks_of(
                    dataclasses.replace(self.sweep, limit=questions),
                    self.model,
                    self.processor,
                    clip=self.clip,
                    processes=Processes(),
                    pixels=self.pixels,
                )
            }
        return self._benchmarks[questions]


def _say(search: Search, target: Target, cells: _Cells) -> None:
    """Table and recommendation to stdout and `tune.md`, the rest to stderr."""
    folder = cells.sweep.output_path
    assert folder is not None  # noqa: S101
    console, table = stdout(), search_table(search, target)
    best, lines = recommendation(search, target)
    table.print(console)
    texts = [table.markdown(), *lines]
    if best is not None:
        line = patch_line(cells.parts_of[best], search.last.found[best]["config"]["positions"])
        lines, texts = [*lines, line], [*texts, f"```python\n{line}\n```"]
    for line in lines:
        console.print(line, markup=False)
    Extras().write("tables", folder / "tune.md", ("\n\n".join(texts) + "\n").encode())
    for word, record in cells.refused.items():
        error = record.get("error") or {}
        sys.stderr.write(f"not run: {word}: {' '.join(error.get('message', '').split())}\n")
    if search.untried:
        sys.stderr.write(f"not tried, as the time was up: {', '.join(search.untried)}\n")
    if search.out_of_time:
        sys.stderr.write(
            f"the time was up after {search.last.questions} questions: the same command goes on "
            f"with what is in {folder}\n"
        )
