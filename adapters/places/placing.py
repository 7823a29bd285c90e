"""Where the images of a call are in its batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ...prune.budget import Stage, plan
from ...prune.choose import ChosenImage
from ...prune.contract import Images
from ...prune.errors import UnsupportedFeatureError
from ..encoded import Encoded
from ..family import Modality
from ..patch_setup import Setup
from ..sequence.placed import PlacedImage


def place(
    setup: Setup, encoded: Mapping[Modality, Encoded], visual: Mapping[Modality, Tensor]
) -> tuple[list[PlacedImage], int]:
    """All images in the order of the prompts, and the number of samples.

    Args:
        visual: (B, L) bool, the columns of the placeholders of each modality.
    """
    placed: list[PlacedImage] = []
    samples = 1
    for modality, of_call in encoded.items():
        images, samples = _place_one(modality, of_call, visual[modality])
        placed += images
    if len(encoded) > 1:  # each modality is in order
        firsts = torch.stack([image.columns[0] for image in placed]).tolist()
        keys = {
            id(image): (image.sample, first) for image, first in zip(placed, firsts, strict=True)
        }
        placed.sort(key=lambda image: keys[id(image)])
    for image, following in zip(placed, [*placed[1:], None], strict=True):
        if following is not None and following.sample == image.sample:
            image.plan = _plan(setup, image.encoded, "context")
    return placed, samples


def _plan(setup: Setup, image: ChosenImage, role: Images) -> tuple[Stage, ...]:
    return plan(image.num_tokens, image.calls, setup.shape, role)


def _place_one(
    modality: Modality, encoded: Encoded, visual: Tensor
) -> tuple[list[PlacedImage], int]:
    """Find each image's columns, and the number of samples.

    Beams repeat a sample's rows, which share its images.
    """
    what = modality.name
    counts = visual.sum(1).tolist()
    tokens = sum(image.num_tokens for image in encoded.images)
    repeats, rest = divmod(sum(counts), tokens) if tokens else (1, sum(counts))
    repeats = max(1, repeats)
    if rest or len(counts) % repeats:
        raise UnsupportedFeatureError(
            f"The batch has {sum(counts)} {what} placeholders for {tokens} visual tokens: "
            f"input_ids and {what}s do not belong together."
        )
    columns = visual.nonzero()[:, 1].split(counts)
    placed: list[PlacedImage] = []
    todo = iter(encoded.images)
    for sample, row in enumerate(range(0, len(counts), repeats)):
        rows = torch.arange(row, row + repeats, device=visual.device)
        used = 0
        while used < counts[row]:
            image = next(todo).to(visual.device)
            placed.append(
                PlacedImage(
                    encoded=image,
                    sample=sample,
                    row=row,
                    rows=rows,
                    columns=columns[row][used : used + image.num_tokens],
                    stopwatch=encoded.stopwatch,
                    plan=image.plan,
                    slots=image.slots,
                    order=image.selection.order,
                    members=image.selection.groups,
                )
            )
            used += image.num_tokens
        if used != counts[row]:
            raise UnsupportedFeatureError(
                f"Row {row} has {counts[row]} {what} placeholders, which is no whole number of "
                f"its {what}s' tokens: input_ids and {what}s do not belong together."
            )
    return placed, len(counts) // repeats
