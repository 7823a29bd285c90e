"""`vlmprune classify`: load once, run the grid on the pictures, then the table and the frontier."""

from __future__ import annotations

from functools import partial

from ..classify.benchmark import Classification
from ..classify.classifier import Classifier, load_classifier
from ..classify.pictures import read_pictures
from ..classify.request import ClassifyRequest
from ..models.loading import resolve_device, short_name
from ..results.records import CLASSES, Config, setting_of
from ..results.store import Store, UnwrittenError
from ..sweep.outcome import say_interrupted, say_what_happened, show
from ..sweep.running import run_grid
from ..words.parts import combined


def run(request: ClassifyRequest) -> int:
    """The command. Returns the exit code: 1 if a cell failed."""
    combinations = combined(request.methods, request.budgets, request.seed)
    device, folder = resolve_device(request.device), request.output_path
    store = Store(folder)
    classifier = load_classifier(request.model, device=device, dtype=request.dtype)
    pictures = read_pictures(request.data, classifier, request.limit)
    benchmark = Classification(
        classifier, pictures, batch_size=request.batch_size, seed=request.seed
    )
    try:
        cells, summary = run_grid(
            _base(request, classifier),
            [benchmark],
            combinations,
            request,
            device=benchmark.device,
            store=store,
            given=partial(_given, request),
        )
    except KeyboardInterrupt:
        say_interrupted(folder, rerun=request.rerun)
        return 130
    except UnwrittenError as error:  # what is on no disk is at least on the screen
        show(folder, [*store.read(), error.record], {setting_of(error.record)})
        raise
    show(folder, store.read(), {cell.config.setting for cell in cells})
    say_what_happened(summary, folder)
    return 1 if summary.failed else 0


def _base(request: ClassifyRequest, classifier: Classifier) -> Config:
    """What all cells share."""
    return Config(
        model=short_name(request.model),
        fingerprint=classifier.fingerprint,
        methods=(),
        positions=None,
        task="",
        task_version="",
        limit=request.limit,
        seed=request.seed,
        dtype=request.dtype,
        attn_implementation=classifier.attention,
        task_kind=CLASSES,
        batch_size=request.batch_size,
    )


def _given(request: ClassifyRequest, config: Config) -> dict[str, object]:
    """The flags that a cell hangs on and that its configuration does not tell, if typed."""
    flags: dict[str, object] = {"data": request.data}
    if request.model != config.model:
        flags["model"] = request.model
    if request.imports and any("source" in method for method in config.methods):
        flags["imports"] = list(request.imports)
    return flags
