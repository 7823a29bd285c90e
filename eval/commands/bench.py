"""`vlmprune bench model`: dense, oracle and patched prefill of one model, side by side, and the
tokens decoded after it.

A method on the KV cache removes nothing from the prefill: its oracle's is the dense model's, and
decodes on a cache of as many entries. Random weights change no time (but what an adaptive rule
finds). A model that the machine cannot hold is not run: FLOPs and bytes follow from sizes alone.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...prune.errors import MethodFieldError
from ..bench.bench_table import bench_table
from ..bench.rounds import compare, peak_memory
from ..bench.subject import Subject
from ..bench.variant import Variant
from ..console import progress, stdout
from ..environment import hardware, load_average, versions
from ..measure.flops import model_cost
from ..measure.memory import MemoryMeasureError, free_memory, in_fresh_process
from ..models.loading import resolve_device
from ..results.records import ResultsError
from ..words.parts import grid, parse, parse_budgets

logger = logging.getLogger(__name__)

SCHEMA = 4
"""4: `ratios`; the oracle decodes as well."""


def run(
    *,
    methods: Sequence[str],
    budgets: Sequence[str],
    shape_name: str | None,
    model_name: str | None,
    picture: tuple[int, int] | None,
    image: str | None,
    layers: int,
    width: int,
    tokens: int,
    batch_size: int,
    ragged: bool,
    repeats: int,
    new_tokens: int,
    memory: bool,
    meta: bool,
    device: str | None,
    dtype: str,
    attn_implementation: str,
    output_path: str | None,
) -> int:
    """The command; arguments are the flags of `vlmprune bench model`. Returns the exit code."""
    if math.isqrt(tokens) ** 2 != tokens or width % 64:
        raise MethodFieldError(
            f"--tokens {tokens} must be a square (e.g. 576) and --width {width} a multiple of 64."
        )
    if ragged and (batch_size == 1 or image is not None):
        raise MethodFieldError(
            "--ragged pads prompts of one batch to the longest: give --batch_size 2 or more, and "
            "no --image."
        )
    combinations = grid(
        [parse(text) for text in methods if text != "dense"], parse_budgets(budgets)
    )
    device = resolve_device(device)
    chosen = dtype
    if dtype == "auto":
        chosen = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    subject = Subject(
        shape=shape_name,
        model_name=model_name,
        picture=picture,
        layers=layers,
        width=width,
        visual_tokens=tokens,
        batch_size=batch_size,
        ragged=ragged,
        dtype=chosen,
        attn_implementation=attn_implementation,
        image=image,
    )
    variants = [Variant(parts) for parts in combinations]
    meta = meta or not _fits(subject, device)
    if meta and dtype == "auto":  # as it would run where it fits
        subject = replace(subject, dtype="bfloat16")

    def save() -> dict[str, Any]:
        """The report so far, also in the file."""
        report = {
            "schema": SCHEMA,
            "measured": not meta,
            "model": subject.as_json(),
            "rounds": max(len(v.rounds) for v in variants),
            "rounds_wanted": 0 if meta else repeats,
            "new_tokens": new_tokens,
            "load_average": load_average(),
            "hardware": hardware(device),
            "versions": versions(),
            "variants": [v.as_json(cost) for v in variants if v.per_layer],
        }
        if output_path:
            _write(output_path, report)
        return report

    if meta:
        cost = model_cost(subject.model("meta"))
        for variant in variants:
            variant.reckon(subject)
        bench_table(save()).print(stdout())
        return 0
    in_children = memory and torch.device(device).type == "cpu"
    with progress() as bar:
        rounds = bar.add_task("bench", total=(repeats + 1 + in_children) * len(variants))
        model = subject.model(device)
        cost = model_cost(model)
        inputs, clip = subject.inputs(device), subject.text_twin(device)
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
    bench_table(save()).print(stdout())
    return 0


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


def _write(output_path: str, report: Mapping[str, Any]) -> None:
    """All or nothing, so that an interrupt leaves the last whole report."""
    path = Path(output_path)
    try:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ResultsError(f"{output_path!r} cannot be written: {error.strerror}.") from error
