"""`vlmprune classify`: load once, run the grid on the pictures, then the table."""

from __future__ import annotations

import sys

from ..classify.classifier import load_classifier
from ..classify.pictures import read_pictures
from ..classify.request import ClassifyRequest
from ..classify.running import FILE_NAME, cells_of, run_cells
from ..classify.table import classify_table
from ..console import progress, stdout
from ..extras import Extras
from ..models.loading import resolve_device
from ..results.store import Store
from ..words.flags import in_flags
from ..words.parts import combined


def run(request: ClassifyRequest) -> int:
    """The command. Returns the exit code: 1 if a cell failed."""
    combinations = combined(request.methods, request.budgets, request.seed)
    device, folder = resolve_device(request.device), request.output_path
    store = Store(folder, FILE_NAME)
    classifier = load_classifier(request.model, device=device, dtype=request.dtype)
    pictures = read_pictures(request.data, classifier, request.limit)
    cells = cells_of(combinations, request, classifier, pictures, device)
    try:
        with progress() as bar:
            task = bar.add_task("starting", total=len(cells))
            records, there = run_cells(
                cells,
                classifier,
                pictures,
                store,
                rerun=request.rerun,
                on_cell=lambda cell: bar.update(
                    task, description=str(cell), completed=cells.index(cell)
                ),
            )
    except KeyboardInterrupt:
        same = "the same command" + " without --rerun" * request.rerun
        sys.stderr.write(f"interrupted: finished cells are in {folder}, {same} goes on there\n")
        return 130
    table = classify_table(records, pictures.named)
    table.print(stdout())
    Extras().write("tables", folder / "classify.md", f"{table.markdown()}\n".encode())
    failed = 0
    for cell, record in zip(cells, records, strict=True):
        if record["status"] != "ok":
            failed += 1
            reason = in_flags(" ".join(record["error"]["message"].split()))
            sys.stderr.write(f"failed: {cell}: {record['error']['type']}: {reason}\n")
    said = f"{len(cells) - there - failed} run, {there} already there (again: --rerun)"
    sys.stderr.write(f"cells: {said}, {failed} failed; results in {folder}\n")
    return 1 if failed else 0
