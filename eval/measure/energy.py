"""Energy of an NVIDIA accelerator, as its own counter tells (NVML)."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

logger = logging.getLogger(__name__)


class EnergyMeter:
    """The counter of one accelerator: everything on it is counted, also other processes."""

    def __init__(self, nvml: Any, handle: Any, device: torch.device) -> None:
        self._nvml = nvml
        self._handle = handle
        self._device = device

    def spent(self, call: Callable[[], object]) -> float:
        """The joules that a call takes, from an idle accelerator to an idle one."""
        torch.cuda.synchronize(self._device)
        before = self.total()
        call()
        torch.cuda.synchronize(self._device)
        return self.total() - before

    def total(self) -> float:
        """Joules since the driver was loaded."""
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


@cache
def energy_meter(device: torch.device) -> EnergyMeter | None:
    """The meter of an accelerator; None where there is none, with the reason in the log."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        logger.warning("No energy is measured: pip install 'vlmprune[energy]'.")
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        meter = EnergyMeter(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"), device)
        meter.total()
    except pynvml.NVMLError as error:
        logger.warning("No energy is measured: NVML says %s.", error)
        return None
    return meter
