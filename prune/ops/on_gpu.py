"""Where greedy selections run as one kernel, see `triton_kernels`; elsewhere they run in torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import lru_cache

import torch
from torch import Tensor

_MOST_TOKENS = 8192  # whose running values one program holds in registers


def in_one_kernel(products: Tensor, most_tokens: int = _MOST_TOKENS) -> bool:
    """Whether the picks in products (..., N, N) can be made by one kernel.

    On a GPU of compute capability 7.0 or more, where Triton is installed and has the C compiler
    that it needs. The torch code picks the same, in several launches a pick.
    """
    return (
        products.is_cuda
        and products.dtype == torch.float32
        and products.shape[-1] <= most_tokens
        and _compiles()
        and _capable(products.device)
    )


@lru_cache(maxsize=1)
def _compiles() -> bool:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    return compiler is not None and importlib.util.find_spec("triton") is not None


@lru_cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (7, 0)
