"""Greedy selections by Triton's kernels and by torch, on inputs with and without ties.

As a program it runs the kernels in Triton's interpreter, on the CPU; TRITON_INTERPRET has to be set
before Triton is imported, so tests start it as a process of its own.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.functional import normalize
from vlmprune.prune.ops import dispersion, dpp, maxmin, triton_kernels

SIZES = ((1, 1), (2, 2), (7, 3), (8, 8), (19, 11))
"""Tokens and picks: all of them too, and numbers that are no powers of two."""


def features(num_tokens: int, device: str) -> Iterator[tuple[str, Tensor]]:
    """Names, and tokens (3, N, 8) of three images."""
    generator = torch.Generator().manual_seed(num_tokens)
    plain = torch.randn(3, num_tokens, 8, generator=generator)
    yield "random", plain.to(device)
    twice = torch.randint(num_tokens // 2 + 1, (3, num_tokens, 1), generator=generator)
    yield "duplicates", plain.gather(1, twice.expand(-1, -1, 8)).to(device)
    corners = torch.randint(0, 2, (3, num_tokens, 4), generator=generator) * 2.0 - 1
    yield "ties", corners.to(device)  # of length 2: all products are exact
    yield "equal", torch.ones(3, num_tokens, 4, device=device)


def both(select: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """What the kernel picks, and what torch does."""
    modules = (maxmin, dispersion, dpp)
    found = []
    for answer in (True, False):
        with ExitStack() as stack:
            for module in modules:
                stack.enter_context(
                    patch.object(module, "in_one_kernel", lambda *_, now=answer: now)
                )
            found.append(select())
    return found[0], found[1]


def compare(device: str) -> int:
    """Check everything, and say how many selections were compared."""
    checked = 0
    for num_tokens, count in SIZES:
        for name, tokens in features(num_tokens, device):
            for rule, select in selections(name, tokens, count).items():
                picks, expected = both(select)
                assert torch.equal(picks, expected), (name, rule, num_tokens, count)
                checked += 1
    return checked


def selections(name: str, tokens: Tensor, count: int) -> dict[str, Callable[[], Tensor]]:
    last = torch.tensor(tokens.shape[1] - 1, device=tokens.device)
    likeness = normalize(tokens, dim=-1) @ normalize(tokens, dim=-1).mT
    if name == "random":  # of full rank, and far from all ties
        eye = torch.linspace(1, 2, tokens.shape[1], device=tokens.device).diag_embed()
        kernels = likeness + eye
    else:  # a diagonal alone is exact in every order of sums
        kernels = (4 * likeness[:, 0]).round().abs().diag_embed()
    weights = likeness[:, 0].contiguous()
    return {
        "max_min": lambda: maxmin.greedy_max_min(tokens, count),
        **{
            rule: lambda rule=rule: dispersion.greedy_dispersion(
                tokens, last.expand(len(tokens)), count, rule
            )
            for rule in ("max_sum", "k_center")
        },
        "max_min of a batch": lambda: max_min_of(likeness, last, count),
        "determinant": lambda: dpp.greedy_map(kernels, count, weights),
    }


def max_min_of(likeness: Tensor, first: Tensor, count: int) -> Tensor:
    """All images in one launch, or one after the other."""
    distances = (1 - likeness).diagonal_scatter(
        torch.full_like(likeness[..., 0], -torch.inf), dim1=1, dim2=2
    )
    parts = distances.split(len(distances) if maxmin.in_one_kernel() else 1)
    return torch.cat(
        [triton_kernels.max_min(part, first.repeat(len(part)), count) for part in parts]
    )


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") == "1"
    sys.stdout.write(f"{compare('cpu')} compared\n")
