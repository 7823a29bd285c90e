"""`vlmprune bench model`: dense, oracle and patched prefill of one model, side by side, and the
tokens decoded after it.

A method on the KV cache removes nothing from the prefill: its oracle's is the dense model's, and
decodes on a cache of as many entries. Random weights change no time (but what an adaptive rule
finds). A model that the machine cannot hold is not run: FLOPs and bytes follow from sizes alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch

from ..arguments.bench_model import BenchModelRequest
from ..bench.bench_table import bench_table
from ..bench.oracle import check_oracle
from ..bench.parts_table import parts_table
from ..bench.report_file import write_report
from ..bench.rounds import compare, peak_memory
from ..bench.subject import Subject, dtype_on
from ..bench.variant import Variant
from ..console import progress, stdout
from ..environment import hardware, load_average, versions
from ..measure.flops import model_cost
from ..measure.memory import MemoryMeasureError, free_memory, in_fresh_process
from ..models.loading import resolve_device
from ..words.parts import grid, parse, parse_budgets
from ..words.typed import DENSE

logger = logging.getLogger(__name__)

SCHEMA = 5
"""4: `ratios`; the oracle decodes as well. 5: `flops` and `shares` of the first token by part."""


def run(request: BenchModelRequest) -> int:
    """The command. Returns the exit code."""
    device = resolve_device(request.device)
    shapes: Sequence[str | None] = request.shapes or [None]
    pictures: Sequence[tuple[int, int] | None] = request.pictures or [None]
    asked = product(shapes, pictures)
    subjects = [_subject(request, device, shape, picture) for shape, picture in asked]
    for subject in subjects if len(subjects) > 1 else ():
        subject.inputs("meta")  # which says what is wrong with a picture, before hours are spent
    reports: list[dict[str, Any]] = []
    for subject in subjects:
        reports.append({})
        _report(request, subject, device, reports)
        bench_table(reports[-1]).print(stdout())
    parts_table(reports).print(stdout())
    return 0


def _report(
    request: BenchModelRequest, subject: Subject, device: str, reports: list[dict[str, Any]]
) -> None:
    """One model and picture; its report becomes the last of `reports`, round by round."""
    words = [parse(text) for text in request.methods if text != DENSE]
    variants = [Variant(parts) for parts in grid(words, parse_budgets(request.budgets))]
    meta = request.meta or not _fits(subject, device)
    if meta and request.dtype == "auto":  # as it would run where it fits
        subject = replace(subject, dtype="bfloat16")
    if not meta:
        check_oracle(subject.model("meta"))
    cost = model_cost(subject.model("meta"))

    def save() -> None:
        """What there is so far, also in the file."""
        reports[-1] = {
            "schema": SCHEMA,
            "measured": not meta,
            "model": subject.as_json(),
            "rounds": max(len(v.rounds) for v in variants),
            "rounds_wanted": 0 if meta else request.repeats,
            "new_tokens": request.new_tokens,
            "load_average": load_average(),
            "hardware": hardware(device),
            "versions": versions(),
            "variants": [v.as_json(cost) for v in variants if v.per_layer],
        }
        if request.output_path:
            write_report(reports[0] if len(reports) == 1 else reports, request.output_path)

    if meta:
        for variant in variants:
            variant.reckon(subject)
    else:
        _measure(request, subject, variants, device, save)
    save()


def _subject(
    request: BenchModelRequest,
    device: str,
    shape: str | None,
    picture: tuple[int, int] | None,
) -> Subject:
    return Subject(
        shape=shape,
        model_name=request.model,
        picture=picture,
        layers=request.layers,
        width=request.width,
        visual_tokens=request.tokens,
        batch_size=request.batch_size,
        ragged=request.ragged,
        dtype=dtype_on(device, request.dtype),
        attn_implementation=request.attn_implementation,
        image=request.image,
    )


def _measure(
    request: BenchModelRequest,
    subject: Subject,
    variants: Sequence[Variant],
    device: str,
    save: Callable[[], object],
) -> None:
    """Round after round, each saved when it is done; then peak memory, if it is asked for."""
    repeats, new_tokens = request.repeats, request.new_tokens
    in_children = request.memory and torch.device(device).type == "cpu"
    with progress() as bar:
        rounds = bar.add_task("bench", total=(repeats + 1 + in_children) * len(variants))
        model = subject.model(device)
        parts = tuple(part for variant in variants for part in variant.parts)
        inputs, clip = subject.inputs(device), subject.text_twin(device, parts)
        for number in range(repeats + 1):
            advance = partial(bar.advance, rounds)
            compare(model, inputs, variants, new_tokens, number, clip, advance)
            save()
        del model, clip  # before others are made
        for variant in variants if in_children else ():
            threads = torch.get_num_threads()
            try:
                variant.peak_memory_bytes = in_fresh_process(
                    peak_memory, subject, variant.parts, new_tokens, threads
                )
            except MemoryMeasureError as error:  # the times are there
                logger.warning("%s: %s", variant.name, error)
            bar.advance(rounds)
            save()


def _fits(subject: Subject, device: str) -> bool:
    """Whether weights, and half as much again for what runs through them, fit in free memory."""
    if subject.model_name is not None:
        return True  # asked for by name: loading says what is wrong
    needed = int(1.5 * subject.parameter_bytes())
    free = free_memory(device)
    if free is None or needed <= free:
        return True
    logger.warning(
        "%s needs about %.0f GiB and %.1f are free: FLOPs and bytes only, nothing is run.",
        subject.name,
        needed / 2**30,
        free / 2**30,
    )
    return False
