"""Calls that take turns, layer by layer, each with clocks that stand still while another runs.

Whatever slows the machine down for longer than a layer slows all of them. They run in one thread,
as memory that one thread has used before costs it less than another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import nn
from transformers import PreTrainedModel

from ...adapters.registry import family_of
from ...adapters.stopwatch import Stopwatch


@dataclass
class Timed:
    """A forward of a model, the time that it takes, and how much of it in the vision encoder."""

    call: Callable[[], Any]
    model: PreTrainedModel
    result: Any = None
    seconds: float = 0.0
    vision_seconds: float = 0.0


@torch.inference_mode()
def take_turns(calls: Sequence[Timed]) -> None:
    """Run all calls, one layer of each at a time, and note in them what they give and what they
    took. They change places from layer to layer: the first finds the weights in no cache."""
    runs = [greenlet(partial(_run, call)) for call in calls]
    try:
        while not all(run.dead for run in runs):
            for run in runs:
                run.switch()  # which does nothing when it has ended
            runs.reverse()
    finally:
        for run in runs:
            run.throw()  # ends those that another's error has left behind


@dataclass
class _Clocks:
    """Those of one call: all that run are stopped while another call has its turn."""

    total: Stopwatch
    vision: Stopwatch
    running: list[Stopwatch] = field(default_factory=list)

    def start(self, clock: Stopwatch) -> None:
        self.running.append(clock)
        clock.__enter__()

    def stop(self, clock: Stopwatch) -> None:
        self.running.remove(clock)
        clock.__exit__(None, None, None)

    def pause(self) -> None:
        for clock in self.running:
            clock.__exit__(None, None, None)

    def resume(self) -> None:
        for clock in self.running:
            clock.__enter__()


def _run(timed: Timed) -> None:
    device: torch.device = timed.model.get_input_embeddings().weight.device
    clocks = _Clocks(Stopwatch(device), Stopwatch(device))
    tower = family_of(timed.model).vision_tower

    def next_turn(*_: Any) -> None:
        clocks.pause()
        getcurrent().parent.switch()
        clocks.resume()

    hooks = [layer.register_forward_pre_hook(next_turn) for layer in _layers(timed.model)]
    hooks += [
        tower.register_forward_pre_hook(lambda *_: clocks.start(clocks.vision)),
        tower.register_forward_hook(lambda *_: clocks.stop(clocks.vision)),
    ]
    try:
        clocks.start(clocks.total)
        timed.result = timed.call()
        clocks.stop(clocks.total)
        timed.seconds, timed.vision_seconds = clocks.total.seconds, clocks.vision.seconds
    finally:
        for hook in hooks:
            hook.remove()


def _layers(model: nn.Module) -> list[nn.Module]:
    """Encoder and decoder layers, and what else models keep in lists."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    return [layer for layers in lists for layer in layers]
