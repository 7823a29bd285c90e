"""Patched models beside the oracle, as near as the precision of their kernels allows."""

from __future__ import annotations

import copy
from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace

import torch
import vlmprune
from kit import zoo
from kit.decoding import call_of, logits_of
from kit.oracle import Truth
from kit.reported import Noted, cached_truth, truth_of
from vlmprune.prune.budget import MethodCall

ALIKE = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}
"""Distance of logits from those expected, relative to their length. Rounding makes up to 0.007 in
float16 and 0.06 in bfloat16. Positions that are off by one from the middle of a prompt on make 0.08
and more, re-packed ones instead of original ones 0.16 and more."""
METHODS = ("divprune", "vtc_cls", "fastv", "sparsevlm", "visual_press")
"""Some for every place: features and signals of the encoder, attention of a layer, merging, entries
of the cache."""
BY_STEP = "token_select"
"""What a step attends to is chosen in this step."""
STEPS = 8


def patched(model, case: zoo.Case, name: str, positions: str | None = None, **budget: float):
    call = call_of(name, **(budget or {"keep_ratio": 0.4}))
    call = replace(call, method=replace(call.method, **zoo.options_for(case, name)))
    return vlmprune.patch(model, [call], positions=positions)


def on_cpu(value):
    """A report, its tensors in memory."""
    if isinstance(value, torch.Tensor):
        return value.cpu()
    if isinstance(value, list | tuple):
        return type(value)(map(on_cpu, value))
    if is_dataclass(value) and not isinstance(value, MethodCall):
        return replace(value, **{f.name: on_cpu(getattr(value, f.name)) for f in fields(value)})
    return value


def truth_for(case: zoo.Case, rows, model, handle) -> Truth:
    """What the model must compute of the prompts that it saw last, on the CPU."""
    told = copy.copy(handle)
    setup = handle._engine.setup
    engine = SimpleNamespace(setup=setup, wanted=lambda: setup, last=on_cpu(handle.last))
    told.__dict__["_engine"] = engine
    method = handle.methods[-1].method
    if isinstance(method, Noted):
        method.notes[:] = on_cpu(method.notes)
    on_cache = handle.methods[-1].name in zoo.ON_CACHE
    return (cached_truth if on_cache else truth_of)(case, case.inputs(rows), model, told)


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of logits (steps, V), the largest of all steps, relative to the length of those expected."""
    apart = (found.float().cpu() - expected).norm(dim=-1)
    return float((apart / expected.norm(dim=-1)).max())


def check(out, truth: Truth, dtype: torch.dtype) -> None:
    """Logits of all steps, along the tokens that were found."""
    for row, tokens in enumerate(out.sequences[:, -STEPS:].tolist()):
        expected = truth.next_logits(row, tokens[:-1])
        assert distance(logits_of(out)[:, row], expected) < ALIKE[dtype]
