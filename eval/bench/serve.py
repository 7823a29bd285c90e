"""A model of transformers under load.

All clients share one model, as threads that serve it do; nothing is batched, which `generate`
leaves to its caller. So waiting times grow with the number of clients, and what pruning saves of a
prefill is saved of the others' waiting, too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel

from ..measure.times import Clock
from ..words.parts import Parts
from .load import Asked, Load, Round, under_load
from .rounds import twin
from .subject import Subject
from .variant import Variant


def serve(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    *,
    clients: int,
    requests: int,
    new_tokens: int,
) -> Load:
    """Let `clients` ask `requests` times each.

    Raises:
        Exception: what stopped a client first.
    """
    return under_load(lambda _: _ask(model, inputs, new_tokens), clients=clients, requests=requests)


@torch.inference_mode()
def _ask(model: PreTrainedModel, inputs: Mapping[str, Tensor], new_tokens: int) -> Asked:
    clock = Clock(model.get_input_embeddings().weight.device)
    started = time.perf_counter()
    model.generate(
        **inputs,
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        logits_processor=LogitsProcessorList([clock]),
    )
    return Asked(clock.stamps[0] - started, time.perf_counter() - started, new_tokens)


@contextmanager
def of_transformers(
    subject: Subject, device: str, cells: Sequence[Parts], new_tokens: int
) -> Iterator[Round]:
    """The subject as this process runs it, patched for each round."""
    model = subject.model(device)
    patched, inputs = twin(model), subject.inputs(device)
    clip = subject.text_twin(device, tuple(part for parts in cells for part in parts))

    def round_of(parts: Parts, clients: int, requests: int) -> Load:
        with Variant(parts).patched(patched, clip):
            return serve(patched, inputs, clients=clients, requests=requests, new_tokens=new_tokens)

    yield round_of
