"""Muon for the layers' matrices, AdamW for the rest; one schedule; checkpoints that resume."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

WARMUP = 100
MUON_FACTOR = 1.5
FLOOR = 0.02


def learning_rate(step: int, steps: int, peak: float, decay: float) -> float:
    """Warm up, stay, then fall linearly over the last `decay` share of the steps.

    Until the fall begins nothing depends on `steps`, so a run may be resumed with another length.
    """
    left = (steps - step) / max(1, round(steps * decay))
    return peak * min((step + 1) / WARMUP, max(FLOOR, min(1.0, left)))


class Optimizers:
    """Both optimizers over a set of named modules."""

    def __init__(self, modules: dict[str, nn.Module], scale: dict[str, float] | None = None):
        scale = scale or {}
        matrices, others = [], []
        self.parameters: list[nn.Parameter] = []
        for prefix, module in modules.items():
            factor = scale.get(prefix, 1.0)
            muon: list[nn.Parameter] = []
            decayed: list[nn.Parameter] = []
            plain: list[nn.Parameter] = []
            for name, parameter in module.named_parameters():
                if not parameter.requires_grad:
                    continue
                self.parameters.append(parameter)
                if parameter.ndim == 2 and "layers." in name:
                    muon.append(parameter)
                else:
                    (decayed if parameter.ndim > 1 else plain).append(parameter)
            if muon:
                matrices.append({"params": muon, "factor": MUON_FACTOR * factor})
            if decayed:
                others.append({"params": decayed, "weight_decay": 0.05, "factor": factor})
            if plain:
                others.append({"params": plain, "weight_decay": 0.0, "factor": factor})
        self.all: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(
                matrices, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, betas=(0.9, 0.98)),
        )

    def step(self, loss: torch.Tensor, rate: float) -> None:
        """One clipped step at a learning rate."""
        for optimizer in self.all:
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.all:
            optimizer.step()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of both."""
        return [optimizer.state_dict() for optimizer in self.all]

    def load_state_dict(self, states: Iterable[dict[str, Any]]) -> None:
        """Restore the state of both."""
        for optimizer, state in zip(self.all, states, strict=True):
            optimizer.load_state_dict(state)


def save(file: Path, modules: dict[str, nn.Module], optimizers: Optimizers, step: int) -> None:
    """Write a checkpoint in one rename, so that a killed run leaves a whole file."""
    state = {name: module.state_dict() for name, module in modules.items()}
    partial = file.with_suffix(".partial")
    torch.save({"modules": state, "optimizers": optimizers.state_dict(), "step": step}, partial)
    os.replace(partial, file)


def load(file: Path, modules: dict[str, nn.Module], optimizers: Optimizers | None = None) -> int:
    """Restore a checkpoint; returns the number of steps done. Batches and drops are drawn from the
    step's number, so modules, optimizers and step are the whole state of a run."""
    state = torch.load(file, map_location="cpu", weights_only=True)
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
    if optimizers is not None:
        optimizers.load_state_dict(state["optimizers"])
    return int(state["step"])
