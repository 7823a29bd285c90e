"""The choice at a cut in the decoder: which images are chosen from together, and what stays."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from ...prune.budget import Stage
from ...prune.choose import choose
from ...prune.contract import Place, Selection, VisualTokens
from ...prune.errors import MethodAnswerError
from ...prune.tiling import Tiling
from ..patch_setup import Setup
from ..sequence.placed import PlacedImage

Chosen = dict[tuple[int, int], Selection]
"""What each cut (layer, number of the image) chose, within one generate()."""


def choices(
    setup: Setup, images: Sequence[PlacedImage], layer: int, done: Chosen | None
) -> Iterator[tuple[Stage, int, Selection]]:
    """What is kept of each image that has a cut at a layer: its stage, its number, its selection.

    Args:
        done: selections made earlier in the same generate(), reused and added to.
    """
    for numbers, stage in _together(images, layer):
        if done is not None and (layer, numbers[0]) in done:
            found = [done[layer, number] for number in numbers]
        else:
            found = _chosen(setup, [images[number] for number in numbers], stage)
        for number, selection in zip(numbers, found, strict=True):
            if done is not None:
                done[layer, number] = selection
            yield stage, number, selection


def _together(images: Sequence[PlacedImage], layer: int) -> list[tuple[list[int], Stage]]:
    """Numbers of images that are chosen from at once: one, or those before a prompt's last."""
    groups: dict[tuple[int, int], tuple[list[int], Stage]] = {}
    for number, image in enumerate(images):
        for stage in image.stages(layer):
            pooled = stage.images == "context"
            key = (image.sample, -1 if pooled else number)
            groups.setdefault(key, ([], stage))[0].append(number)
    return list(groups.values())


def _chosen(setup: Setup, images: list[PlacedImage], stage: Stage) -> list[Selection]:
    sizes = [len(image.slots) for image in images]
    if not sum(sizes):
        return [Selection(kept=images[0].slots)] * len(images)
    planned = sum(one.keep for image in images for one in image.stages(stage.layer))
    keep = min(planned, sum(sizes))  # an earlier cut may have left fewer than planned
    signals = {
        need: torch.cat([image.signals[need] for image in images])
        if need.per == "token"
        else images[0].signals[need]
        for need in images[0].signals
    }
    tokens = VisualTokens(
        num_tokens=sum(sizes),
        tiling=_joined([image.encoded.tiling for image in images]),
        shape=setup.shape,
        signals=signals,
        alive=torch.cat([image.row_tokens for image in images]),
        place=Place.DECODER,
        layer=stage.layer,
    )
    stages, device = [replace(stage, keep=keep)], images[0].slots.device
    with images[0].stopwatch:
        (chosen,) = choose(stages, [tokens], device, record=setup.record, debug=setup.debug)
    return [chosen] if len(images) == 1 else _split(stage, chosen, sizes)


def _joined(tilings: list[Tiling]) -> Tiling:
    """Several images as one after the other."""
    return tilings[0] if len(tilings) == 1 else Tiling(sum((t.blocks for t in tilings), ()))


def _split(stage: Stage, chosen: Selection, sizes: list[int]) -> list[Selection]:
    """A choice from several images, image by image."""
    if chosen.order is not None or chosen.features is not None:
        raise MethodAnswerError(
            f"{stage.call.name} merged or moved rows at a cut that pools images, where tokens can "
            f"only be kept or dropped."
        )
    parts, start = [], 0
    for size in sizes:
        inside = (chosen.kept >= start) & (chosen.kept < start + size)
        scores = None if chosen.scores is None else chosen.scores[start : start + size]
        parts.append(Selection(kept=chosen.kept[inside] - start, scores=scores))
        start += size
    return parts
