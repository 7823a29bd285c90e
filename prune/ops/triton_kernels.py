"""Greedy selections as one Triton kernel each: a launch in all, in place of several for every pick.

A program makes all picks in one matrix of products and holds the running values of its tokens in
registers. Max-min and dispersion pick what the torch code in `maxmin` and `dispersion` picks, bit
for bit: each value goes through the same additions and comparisons in the same order. A determinant
sums in another order than a matrix product does (as every device has its own): picks may differ
where two growths agree to rounding.

Import this only where `on_gpu.in_one_kernel` says so.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 8192  # values of earlier rows of a factor that are in flight at once


def max_min(distances: Tensor, first: Tensor, count: int) -> Tensor:
    """Picks of greedy max-min from distances (B, N, N), -inf on the diagonal, and first picks (B,).

    Returns:
        (B, count) int64 indices in the order of picking. Ties go to the lower index.
    """
    picks = first.new_empty(len(distances), count)
    with torch.cuda.device_of(distances):
        _max_min[(len(distances),)](
            distances.contiguous(),
            first.contiguous(),
            picks,
            distances.shape[-1],
            count,
            **_size(distances),
        )
    return picks


def dispersion(likeness: Tensor, first: Tensor, count: int, *, by_sum: bool) -> Tensor:
    """Picks of greedy dispersion from products (B, N, N) and first picks (B,).

    Args:
        by_sum: the next pick is least like all picks in sum; otherwise least like the pick that it
            resembles most.

    Returns:
        (B, count) int64 indices in the order of picking. Ties go to the lower index.
    """
    picks = first.new_empty(len(likeness), count)
    with torch.cuda.device_of(likeness):
        _dispersion[(len(likeness),)](
            likeness.contiguous(),
            first.contiguous(),
            picks,
            likeness.shape[-1],
            count,
            BY_SUM=by_sum,
            **_size(likeness),
        )
    return picks


def determinant(kernels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Picks (B, count) int64 of greedy determinants of (B, N, N), and which of them made one grow.

    Ties go to the lower index.
    """
    batch, num_tokens = kernels.shape[:2]
    picks = torch.empty(batch, count, dtype=torch.int64, device=kernels.device)
    found = torch.empty(batch, count, dtype=torch.bool, device=kernels.device)
    factor = kernels.new_empty(batch, count, num_tokens)
    size = _size(kernels)
    with torch.cuda.device_of(kernels):
        _determinant[(batch,)](
            kernels.contiguous(),
            factor,
            picks,
            found,
            num_tokens,
            count,
            ROWS=max(1, min(16, _TILE // size["BLOCK"])),
            **size,
        )
    return picks, found


def _size(matrices: Tensor) -> dict[str, int]:
    block = triton.next_power_of_2(matrices.shape[-1])
    warps = max(1, min(16, block // 128))
    # As torch rounds: a product, then a sum.
    return {"BLOCK": block, "num_warps": warps, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["count"])
def _max_min(distances, first, picks, num_tokens, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    image = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_tokens
    distances += image * num_tokens * num_tokens
    picks += image * count
    last = tl.load(first + image)
    tl.store(picks, last)
    nearest = tl.where(inside, float("inf"), float("-inf"))
    for i in range(1, count):
        row = tl.load(distances + last * num_tokens + columns, mask=inside, other=float("-inf"))
        nearest = tl.minimum(nearest, row)
        last = tl.argmax(nearest, 0).to(tl.int64)
        tl.store(picks + i, last)


@triton.jit(do_not_specialize=["count"])
def _dispersion(  # type: ignore[no-untyped-def]
    likeness, first, picks, num_tokens, count, BY_SUM: tl.constexpr, BLOCK: tl.constexpr
):
    image = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_tokens
    likeness += image * num_tokens * num_tokens
    picks += image * count
    last = tl.load(first + image)
    tl.store(picks, last)
    if BY_SUM:
        total = tl.where(inside, 0.0, float("inf"))
    else:
        total = tl.where(inside, float("-inf"), float("inf"))
    for i in range(1, count):
        row = tl.load(likeness + last * num_tokens + columns, mask=inside, other=0)
        if BY_SUM:
            total += row
        else:
            total = tl.maximum(total, row)
        total = tl.where(columns == last, float("inf"), total)
        last = tl.argmin(total, 0).to(tl.int64)
        tl.store(picks + i, last)


@triton.jit(do_not_specialize=["count"])
def _determinant(  # type: ignore[no-untyped-def]
    kernels, factor, picks, found, num_tokens, count, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    image = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_tokens
    kernels += image * num_tokens * num_tokens
    factor += image * count * num_tokens
    picks += image * count
    found += image * count
    growth = tl.load(kernels + columns * (num_tokens + 1), mask=inside, other=float("-inf"))
    for i in range(0, count):
        best = tl.max(growth, 0)
        pick = tl.argmax(growth, 0).to(tl.int64)
        tl.store(picks + i, pick)
        tl.store(found + i, best > 0)
        row = tl.load(kernels + pick * num_tokens + columns, mask=inside, other=0)
        for start in range(0, i, ROWS):
            earlier = start + tl.arange(0, ROWS)
            known = earlier < i
            at_pick = tl.load(factor + earlier * num_tokens + pick, mask=known, other=0)
            places = earlier[:, None] * num_tokens + columns[None, :]
            done = tl.load(factor + places, mask=known[:, None] & inside[None, :], other=0)
            row -= tl.sum(at_pick[:, None] * done, 0)
        root = tl.sqrt_rn(tl.where(best > 0, best, 1.0))
        row = tl.where(best > 0, tl.div_rn(row, root), 0.0)
        tl.store(factor + i * num_tokens + columns, row, mask=inside)
        tl.debug_barrier()  # other threads read this row at the next picks
        growth = tl.where(columns == pick, float("-inf"), growth - row * row)
