"""The images of a call: how their tokens lie, and what was chosen of them before the LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prune.choose import ChosenImage, choose_images
from ..prune.contract import Features, Selection, Signal
from ..prune.errors import MissingSignalError, UnsupportedFeatureError
from ..prune.tiling import Tiling
from .patch_setup import Setup
from .stopwatch import Stopwatch

Entering = tuple[Sequence[int], Sequence[int]]
"""Rows of each picture (tile, frame) that enter an encoder block's attention, and its MLP."""
MARK = "_vlmprune_encoded"
"""Attribute of the encoder's output that carries `Encoded` through generate()."""


@dataclass(frozen=True)
class Encoded:
    """All images (or videos) of a call, in batch order."""

    images: list[ChosenImage]
    stopwatch: Stopwatch
    setup: Setup
    """What they were encoded with, and enter the LLM with."""
    entering: Sequence[Entering] = ()
    """Per encoder block from the first that rows left in; empty where none left."""


def encode(
    setup: Setup,
    tilings: Sequence[Tiling],
    signals: Sequence[Mapping[Signal, Tensor]],
    device: torch.device,
    numbers: Sequence[int] | None = None,
    *,
    left: Sequence[Selection | None] | None = None,
    entering: Sequence[Entering] = (),
    stopwatch: Stopwatch | None = None,
) -> Encoded:
    """Count and choose for every image.

    Args:
        tilings: how the tokens of each image lie.
        signals: per image, what the method before the LLM declared.
        numbers: those of the images in the call; None: from 0 on.
        left: per image, what a method in the encoder left.
        entering: rows that entered the encoder's blocks.
        stopwatch: what has timed choices in the encoder.
    """
    stopwatch = stopwatch or Stopwatch(device)
    calls = setup.calls_of(range(len(tilings)) if numbers is None else numbers)
    images = choose_images(
        setup.shape,
        tilings,
        signals,
        calls,
        device,
        encoded=left,
        record=setup.record,
        debug=setup.debug,
        timed=stopwatch,
    )
    return Encoded(images, stopwatch, setup, entering)


def encode_merged(setup: Setup, embeds: Tensor, visual: Tensor) -> Encoded:
    """Images that the caller merged into `embeds` (B, L, D) itself, at the columns `visual`.

    Each run of visual tokens counts as one image of a single row.
    """
    if setup.in_encoder is not None:
        raise UnsupportedFeatureError(
            f"{setup.in_encoder.name} removes rows inside the vision encoder, which has run "
            f"already where inputs_embeds come with visual_mask: give input_ids and pixel_values, "
            f"or use a method that acts before the LLM."
        )
    signals, tilings = [], []
    for row, marks in zip(embeds, visual.tolist(), strict=True):
        start = None
        for column, mark in enumerate([*marks, False]):
            if mark and start is None:
                start = column
            elif not mark and start is not None:
                signals.append(_merged_signals(setup.read, row[start:column]))
                tilings.append(Tiling.single(1, column - start))
                start = None
    return encode(setup, tilings, signals, embeds.device)


def _merged_signals(needs: Sequence[Signal], features: Tensor) -> dict[Signal, Tensor]:
    """Signals of visual tokens that the caller merged into `inputs_embeds`: features only."""
    for need in needs:
        if not isinstance(need, Features):
            raise MissingSignalError(
                f"{need} cannot be read from inputs_embeds with visual_mask: give input_ids and "
                f"pixel_values, or use a method that needs features only (divprune)."
            )
    return dict.fromkeys(needs, features)
