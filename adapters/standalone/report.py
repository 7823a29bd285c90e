"""`handle.last` of an image encoder: what became of the patches of each picture."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...prune.budget import plan
from ...prune.contract import Selection
from ...prune.tiling import Tiling
from ..patch_setup import Setup
from ..places.passage import Passage
from ..report import Last
from ..reporting import in_encoder, layers_read, remarks


def report(setup: Setup, grid: tuple[int, int], pictures: int, passage: Passage | None) -> Last:
    """
    Args:
        passage: that has ended; None: nothing left.
    """
    total = grid[0] * grid[1]
    shortened = passage is not None and not passage.method.restores
    left = _left(passage) if shortened else [Selection(kept=torch.arange(total))] * pictures
    found = tuple(replace(c, found=left[0].count) if shortened else c for c in setup.calls)
    last = Last(
        tilings=[Tiling.single(*grid)] * pictures,
        kept=[one.kept for one in left],
        order=[one.order for one in left],
        tokens_kept=[one.count for one in left],
        image_sample=list(range(pictures)),
        text_tokens=[0] * pictures,
        plans=[plan(total, found, setup.shape)] * pictures,
        positions=setup.reported_positions,
        num_layers=0,
        layers_read=layers_read(setup),
        stopwatches=[] if passage is None else [passage.stopwatch],
        members=[one.groups for one in left],
        encoder=[] if passage is None else list(passage.entering),
        unranked={call.name: call.method.unranked for call in setup.calls},
        note=remarks([(total, setup.calls)]),
        recorded=setup.record,
    )
    if shortened:
        last.stages.append(in_encoder(setup, left))
    return last


def _left(passage: Passage | None) -> list[Selection]:
    """Per picture, its rows in the order in which the encoder gives them."""
    assert passage is not None  # noqa: S101  (for the types)
    found: dict[int, Selection] = {}
    for group in passage.groups:
        for at, number in enumerate(group.pictures):
            place, member = group.left(at)
            found[number] = _selection(place, member, group.merged)
    return [found[number] for number in range(passage.num_pictures)]


def _selection(place: Tensor, member: Tensor, merged: bool) -> Selection:
    """
    Args:
        place: (K,) the patch that each row stands for, -1 for none.
        member: (N,) the row that each patch is in, -1 where it was dropped.
    """
    kept = place[place >= 0].sort().values
    groups = None
    if merged:
        patches = (member >= 0).nonzero()[:, 0]
        groups = torch.stack([member[patches], patches])
        groups = groups[:, groups[0].argsort(stable=True)]
    plain = len(kept) == len(place) and torch.equal(kept, place)
    return Selection(kept=kept, order=None if plain else place, groups=groups)
