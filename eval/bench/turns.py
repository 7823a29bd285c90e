"""Calls that take turns, layer by layer, each with clocks that stand still while another runs.

Whatever slows the machine down for longer than a layer slows all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...adapters.registry import family_of
from ...adapters.report import Stopwatch


@dataclass
class Timed:
    """A forward of a model, the time that it takes, and how much of it in the vision encoder."""

    call: Callable[[], Any]
    model: PreTrainedModel
    result: Any = None
    seconds: float = 0.0
    vision_seconds: float = 0.0


def take_turns(calls: Sequence[Timed], first: int = 0) -> None:
    """Run all calls, one layer of each at a time beginning with the `first`, and note in them what
    they give and what they took."""
    baton = _Baton(len(calls), first)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(len(calls)) as pool:
        runs = [pool.submit(_run, call, baton, i, threads) for i, call in enumerate(calls)]
        for run in runs:
            run.result()


class _Baton:
    """One of several threads has it, and runs."""

    def __init__(self, players: int, first: int) -> None:
        self._turns = [threading.Semaphore(0) for _ in range(players)]
        self._left = set(range(players))
        self._turns[first].release()

    def wait(self, player: int) -> None:
        self._turns[player].acquire()

    def give(self, player: int) -> None:
        """To the next one, who may be oneself."""
        behind = sorted(self._left, key=lambda other: (other <= player, other))
        if behind:
            self._turns[behind[0]].release()

    def leave(self, player: int) -> None:
        self._left.discard(player)
        self.give(player)


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


@torch.inference_mode()
def _run(timed: Timed, baton: _Baton, player: int, threads: int) -> None:
    torch.set_num_threads(threads)  # which OpenMP keeps for each thread
    device: torch.device = timed.model.get_input_embeddings().weight.device
    clocks = _Clocks(Stopwatch(device), Stopwatch(device))
    tower = family_of(timed.model).vision_tower(timed.model)

    def next_turn(*_: Any) -> None:
        clocks.pause()
        baton.give(player)
        baton.wait(player)
        clocks.resume()

    hooks = [layer.register_forward_pre_hook(next_turn) for layer in _layers(timed.model)]
    hooks += [
        tower.register_forward_pre_hook(lambda *_: clocks.start(clocks.vision)),
        tower.register_forward_hook(lambda *_: clocks.stop(clocks.vision)),
    ]
    baton.wait(player)
    try:
        clocks.start(clocks.total)
        timed.result = timed.call()
        clocks.stop(clocks.total)
        timed.seconds, timed.vision_seconds = clocks.total.seconds, clocks.vision.seconds
    finally:
        for hook in hooks:
            hook.remove()
        baton.leave(player)


def _layers(model: nn.Module) -> list[nn.Module]:
    """Encoder and decoder layers, and what else models keep in lists."""
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    return [layer for layers in lists for layer in layers]
