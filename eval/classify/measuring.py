"""One cell: a classifier on all pictures, dense or with methods inside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ...adapters.patching import patch
from ...prune.budget import MethodCall
from ..results.statistics import Score, mean_score
from .classifier import Classifier
from .pictures import Pictures

_FUSED_ON_A_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class Measured(TypedDict):
    """What a cell yields.

    `images_per_second`: of the forward passes alone, a pass before them not counted. `gflops`: of
    one picture, as torch counts one batch (multiply-add = 2; matrix products, convolutions and
    attention). `tokens_kept`: patches or groups left behind the last block, a mean; None of the
    dense model. `peak_memory_bytes`: of the accelerator, with weights; None on a CPU.
    """

    top1: Score
    images_per_second: float
    gflops: float
    tokens_kept: float | None
    peak_memory_bytes: int | None


@torch.inference_mode()
def measure(
    classifier: Classifier,
    pictures: Pictures,
    calls: Sequence[MethodCall],
    *,
    batch_size: int,
    seed: int,
) -> Measured:
    """Run all pictures; the model is as before when this returns or raises."""
    torch.manual_seed(seed)
    first = next(classifier.model.parameters())
    device, dtype = first.device, first.dtype
    on_gpu = device.type == "cuda"
    outcomes: list[float] = []
    kept: list[int] = []
    seconds, gflops = 0.0, None
    with patch(classifier.model, calls) if calls else nullcontext() as handle:
        for pixels, right in pictures.batches(classifier, batch_size):
            batch = pixels.to(device, dtype)
            if gflops is None:  # this pass warms up, too
                gflops = _counted(classifier, batch) / len(batch) / 1e9
                if on_gpu:
                    torch.cuda.reset_peak_memory_stats(device)
            _wait(device)
            started = time.perf_counter()
            logits = classifier.logits(batch)
            _wait(device)
            seconds += time.perf_counter() - started
            said = logits.argmax(-1).tolist()
            outcomes += [float(a == b) for a, b in zip(said, right, strict=True)]
            if handle is not None:
                kept += handle.last.tokens_kept
    return Measured(
        top1=mean_score(outcomes),
        images_per_second=len(outcomes) / seconds,
        gflops=gflops or 0.0,
        tokens_kept=statistics.fmean(kept) if kept else None,
        peak_memory_bytes=torch.cuda.max_memory_allocated(device) if on_gpu else None,
    )


def _counted(classifier: Classifier, batch: Tensor) -> float:
    """FLOPs of one pass. Torch knows the fused attention of accelerators, not that of a CPU."""
    counter = FlopCounterMode(display=False, custom_mapping={_FUSED_ON_A_CPU: _fused_on_a_cpu})
    with counter:
        classifier.logits(batch)
    return float(counter.get_total_flops())


def _fused_on_a_cpu(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    """Of `q k^T` and `p v`, from shapes (B, H, L, D)."""
    return int(2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1]))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
