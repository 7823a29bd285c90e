"""From the vision encoder's output to a choice per image: signals, counts, selection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..prune.budget import Stage, plan
from ..prune.contract import (
    ClsAttention,
    Features,
    PixelSeed,
    ReceivedAttention,
    Signal,
    VisualTokens,
)
from ..prune.errors import MissingSignalError, VlmpruneError
from .cache import Ticket
from .report import Stopwatch
from .setup import Setup


@dataclass(frozen=True)
class EncodedImage:
    """One image with its cuts; `kept` (K,) are the tokens that enter the LLM, ascending."""

    num_tokens: int
    grid: tuple[int, int]
    plan: tuple[Stage, ...]
    kept: Tensor


@dataclass(frozen=True)
class Encoded:
    """All images of a call, in batch order."""

    images: list[EncodedImage]
    stopwatch: Stopwatch
    owner: Ticket
    """The patch that encoded them."""


def encode(
    setup: Setup,
    grids: Sequence[tuple[int, int]],
    signals: Sequence[Mapping[Signal, Tensor]],
    device: torch.device,
) -> Encoded:
    """Count and choose for every image; the choice before the LLM is made here, once per image.

    Args:
        grids: rows and columns per image.
        signals: per image, what the method before the LLM declared.
    """
    stopwatch = Stopwatch(device)
    images = []
    for grid, seen in zip(grids, signals, strict=True):
        num_tokens = grid[0] * grid[1]
        stages = plan(num_tokens, setup.calls, setup.shape)
        kept = torch.arange(num_tokens, device=device)
        if stages and stages[0].layer == 0:
            tokens = VisualTokens(num_tokens=num_tokens, grid=grid, shape=setup.shape, signals=seen)
            kept = choose(stages[0], tokens, stopwatch)
        images.append(EncodedImage(num_tokens, grid, stages, kept))
    return Encoded(images, stopwatch, setup.ticket)


@torch.no_grad()
def choose(stage: Stage, tokens: VisualTokens, stopwatch: Stopwatch) -> Tensor:
    """The indices that `stage` keeps of `tokens`, (K,) ascending."""
    device = stopwatch.device.type
    # Scores are float32 whatever autocast the caller is in.
    with stopwatch, torch.autocast(device, enabled=False):
        kept = stage.call.method.select(tokens, stage.keep).kept
    if kept.shape != (stage.keep,):
        raise VlmpruneError(
            f"{stage.call.name}.select returned indices of shape {tuple(kept.shape)} for a count "
            f"of {stage.keep}: a method must keep exactly what it was asked to."
        )
    return kept


def encode_merged(setup: Setup, needs: Sequence[Signal], embeds: Tensor, visual: Tensor) -> Encoded:
    """Images that the caller merged into `embeds` (B, L, D) itself, at the columns `visual`.

    Each run of visual tokens counts as one image of a single row.
    """
    signals, grids = [], []
    for row, marks in zip(embeds.detach(), visual.tolist(), strict=True):
        start = None
        for column, mark in enumerate([*marks, False]):
            if mark and start is None:
                start = column
            elif not mark and start is not None:
                signals.append(_merged_signals(needs, row[start:column]))
                grids.append((1, column - start))
                start = None
    return encode(setup, grids, signals, embeds.device)


def _merged_signals(needs: Sequence[Signal], features: Tensor) -> dict[Signal, Tensor]:
    """Signals of visual tokens that the caller merged into `inputs_embeds`: features only."""
    for need in needs:
        if not isinstance(need, Features):
            raise MissingSignalError(
                f"{need} cannot be read from inputs_embeds with visual_mask: give input_ids and "
                f"pixel_values, or use a method that needs features only (divprune)."
            )
    return dict.fromkeys(needs, features)


def pixel_seed(pixels: Tensor) -> Tensor:
    """A 0-d int64 from the bits of an image's pixels; equal pixels give equal seeds anywhere."""
    bits = pixels.float().contiguous().view(torch.int32).flatten().long()
    weights = torch.arange(bits.numel(), device=bits.device) % 8191 + 1
    return (bits * weights).sum() % (2**31 - 1)


class Recording:
    """Attention scores of the encoder layers that were asked for, filled by taps in one call."""

    def __init__(self) -> None:
        self._parts: dict[Signal, list[Tensor]] = {}

    def add(self, signal: Signal, scores: Tensor) -> None:
        """Windowed and packed encoders call attention once per segment, in sequence order."""
        self._parts.setdefault(signal, []).append(scores)

    def scores(self, signal: Signal) -> Tensor:
        """(B, S) as the attention modules saw the tokens."""
        parts = self._parts.get(signal)
        if not parts:
            raise VlmpruneError(f"The vision encoder ran without reaching the layer of {signal}.")
        return torch.cat(parts, dim=1)


def image_signals(
    family: Any,
    model: torch.nn.Module,
    needs: Sequence[Signal],
    features: Sequence[Tensor],
    inputs: Mapping[str, Any],
    recording: Recording,
) -> list[dict[Signal, Tensor]]:
    """Per image, each declared signal as the contract describes it."""
    columns: dict[Signal, Sequence[Tensor]] = {}
    for need in needs:
        if isinstance(need, Features):
            columns[need] = [f.detach() for f in features]
        elif isinstance(need, PixelSeed):
            columns[need] = [pixel_seed(p) for p in family.pixels(model, inputs)]
        elif isinstance(need, ClsAttention | ReceivedAttention):
            scores = recording.scores(need)
            columns[need] = family.per_image(model, scores, features, inputs)
    return [{need: columns[need][i] for need in columns} for i in range(len(features))]
