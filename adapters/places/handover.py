"""From the images of a call to the pictures that the encoder sees, and from the rows that it leaves
back to the tokens of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...prune.budget import MethodCall, plan
from ...prune.contract import InEncoder, ModelShape, Place, Selection, Signal
from ...prune.errors import UnsupportedFeatureError
from ...prune.joining import with_newlines
from ...prune.reductions import counts_of, rows_kept
from ...prune.tiling import Tiling
from ..family import Call, Family
from ..patch_setup import Setup
from .packed import PackedPassage
from .padded import PaddedPassage
from .passage import Passage
from .picture import Picture


@dataclass(frozen=True)
class Handed:
    """One image on its way through the encoder."""

    tiling: Tiling
    places: Tensor
    """(P,) of each of its patches in the prompt's order, the place among all that the encoder
    sees."""
    pictures: range
    """Numbers of its pictures."""
    spare: int
    """Newlines that stay, as the budget has room for them."""
    reduced: bool
    """Whether anything leaves."""


class Handover:
    """The images of one call that a method inside the encoder shortens.

    Attributes:
        tilings: how the tokens of each image lie.
        passage: of the encoder's pass; None where nothing leaves.
    """

    def __init__(
        self, family: Family, call: Call, setup: Setup, calls: Sequence[tuple[MethodCall, ...]]
    ) -> None:
        encoder = family.encoder
        assert encoder is not None and setup.in_encoder is not None  # noqa: S101  (for the types)
        method = setup.in_encoder
        seen = family.pictures(call)
        places = _places(family, call, encoder.unit, encoder.prefix, encoder.packed)
        tilings = self.tilings = family.tilings(call, places)
        sizes = [rows * columns for of_image in seen for rows, columns in of_image]
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + size)
        self._starts = starts
        self.images: list[Handed] = []
        pictures: list[Picture] = []
        for number, grids in enumerate(seen):
            image = range(len(pictures), len(pictures) + len(grids))
            whole = None if method.restores else _whole_numbers(places[number])
            present = None if whole is None else self._present(whole, image)
            inside = [rows * columns for rows, columns in grids]
            inside = inside if present is None else [len(own) for own in present]
            mixed = present is None and not method.restores
            refusal = _resampled(method, family, call, number) if mixed else None
            spare, counts = counts_of_image(
                calls[number], setup.shape, tilings[number], inside, grids, refusal
            )
            for n, grid in enumerate(grids):
                own = None if present is None else present[n]
                after = None if counts is None or counts[n][-1] == inside[n] else counts[n]
                pictures.append(_picture(grid, after, own, in_raster_order=not encoder.packed))
            left = places[number][:, 0] if whole is None else whole
            if setup.first is not None:  # it chooses among patches
                spare = 0
            self.images.append(Handed(tilings[number], left, image, spare, counts is not None))
        self.passage: Passage | None = None
        reduced = any(image.reduced for image in self.images)
        if (reduced and not method.restores) or any(one.counts is not None for one in pictures):
            kind = PackedPassage if encoder.packed else PaddedPassage
            device = call.inputs[call.modality.pixels].device
            self.passage = kind(
                method,
                setup.shape.tower,
                pictures,
                device,
                prefix=encoder.prefix,
                unit=encoder.unit,
                debug=setup.debug,
            )

    def _present(self, places: Tensor, pictures: range) -> list[Tensor]:
        """Per picture of an image, those of its places that reach the prompt, in the prompt's
        order."""
        edges = torch.tensor(self._starts[pictures.start : pictures.stop + 1])
        of = torch.bucketize(places, edges, right=True) - 1
        return [places[of == n] - edges[n] for n in range(len(pictures))]

    def selections(self, device: torch.device) -> list[Selection | None]:
        """What is left of each image, in its own numbers; None: everything."""
        passage = self.passage
        if passage is None or passage.method.restores:
            return [None] * len(self.images)
        by_picture: dict[int, tuple[Tensor, Tensor]] = {}
        for group in passage.groups:
            for at, number in enumerate(group.pictures):
                by_picture[number] = group.left(at)
        return [
            self._selection(image, by_picture, passage, device) if image.reduced else None
            for image in self.images
        ]

    def _selection(
        self,
        image: Handed,
        by_picture: Mapping[int, tuple[Tensor, Tensor]],
        passage: Passage,
        device: torch.device,
    ) -> Selection:
        tiling, first = image.tiling, self._starts[image.pictures.start]
        total = self._starts[image.pictures.stop] - first
        token = torch.full((total,), -1, device=device)  # of each place
        patches = tiling.patches(device)
        token[image.places.to(device) - first] = patches
        tokens, members = [], []
        rows = 0
        for number in image.pictures:
            place, member = (one.to(device) for one in by_picture[number])
            start = self._starts[number] - first
            here = token[start : self._starts[number + 1] - first]
            own = here[place.clamp_min(0)].where(place >= 0, -1)
            tokens.append(own)
            members.append((member + rows).where(member >= 0, -1))
            rows += len(place)
        row_token, member = torch.cat(tokens), torch.cat(members)
        last = torch.iinfo(torch.int64).max
        order = row_token.where(row_token >= 0, last).argsort(stable=True)
        arranged = row_token[order]  # those that stand for no token are behind
        groups = None
        if any(group.merged for group in passage.groups):
            into = order.argsort()
            pairs = torch.stack([into[member.clamp_min(0)], token])
            pairs = pairs[:, (member >= 0) & (token >= 0)]  # padding may have been merged
            groups = pairs[:, (pairs[0] * tiling.num_tokens + pairs[1]).argsort()]
        selection = Selection(kept=arranged, groups=groups)
        if passage.method.fuses(passage.tower):
            kept = arranged[arranged >= 0]  # the host waits: how many rows are fused
            fused = torch.arange(len(kept), len(arranged), device=device)
            features = torch.cat([passage.extra[number] for number in image.pictures])
            selection = replace(selection, kept=kept)
            if len(fused):
                selection = replace(
                    selection, order=arranged, features=features, rows=fused, projected=True
                )
        return with_newlines(selection, tiling.newlines(device)[: image.spare])

    def alive(
        self, selections: Sequence[Selection | None], signals: Sequence[dict[Signal, Tensor]]
    ) -> list[dict[Signal, Tensor]]:
        """Signals of all patches of each image as those of the tokens that are left."""
        found = []
        for image, selection, of_image in zip(self.images, selections, signals, strict=True):
            if selection is None:
                found.append(of_image)
                continue
            device = selection.kept.device
            patch = torch.full((image.tiling.num_tokens,), 0, device=device)
            patches = image.tiling.patches(device)
            patch[patches] = torch.arange(len(patches), device=device)
            at = patch[selection.kept]
            found.append(
                {
                    need: value[at] if need.per == "token" else value
                    for need, value in of_image.items()
                }
            )
        return found


def _places(family: Family, call: Call, unit: int, prefix: int, packed: bool) -> Sequence[Tensor]:
    """Per image, the place of each of its patches among all that the encoder sees, as the model's
    own packing orders them, and its square, by which mixed patches are told: (P, 2) float64."""
    sizes = [rows * columns for of_image in family.pictures(call) for rows, columns in of_image]
    total = sum(sizes)
    numbers = torch.arange(total, dtype=torch.float64)
    numbers = torch.stack([numbers, numbers**2], -1)
    if packed:
        return family.per_image(call, numbers.repeat_interleave(unit, 0)[None])
    by_picture = numbers.view(len(sizes), -1, 2)
    front = by_picture.new_full((len(sizes), prefix, 2), -1)
    return family.per_image(call, torch.cat([front, by_picture], 1))


def _whole_numbers(places: Tensor) -> Tensor | None:
    """(P,) int64; None where the model mixes patches on their way to the prompt."""
    whole, squares = places.unbind(-1)
    if not torch.equal(whole**2, squares) or len(whole.unique()) < len(whole):
        return None
    return whole.long()


def _picture(
    grid: tuple[int, int],
    counts: tuple[int, ...] | None,
    places: Tensor | None,
    *,
    in_raster_order: bool,
) -> Picture:
    """
    Args:
        places: (P,) those that reach the prompt, which has them in raster order; None: all.
        in_raster_order: whether the encoder has them so, too.
    """
    total = grid[0] * grid[1]
    raster = present = None
    if places is not None and len(places) < total:
        present = places.sort().values
    if places is not None and not in_raster_order:
        raster = places.argsort()
    return Picture(total=total, grid=grid, counts=counts, present=present, raster=raster)


def counts_of_image(
    calls: tuple[MethodCall, ...],
    shape: ModelShape,
    tiling: Tiling,
    patches: Sequence[int],
    grids: Sequence[tuple[int, int]],
    refusal: UnsupportedFeatureError | None = None,
) -> tuple[int, list[tuple[int, ...]] | None]:
    """Newlines that stay of an image, and rows after each cut in each of its pictures; None where
    nothing leaves.

    Args:
        refusal: raised where rows would leave.
    """
    call = next(call for call in calls if call.method.place is Place.ENCODER)
    method = call.method
    assert isinstance(method, InEncoder)  # noqa: S101  (for the types)
    total, seen = tiling.num_tokens, sum(patches)
    stages = plan(total, calls, shape)
    planned = next((stage.keep for stage in stages if stage.place is Place.ENCODER), total)
    if planned >= total and call.budget is not None and not method.restores:
        return tiling.num_newlines, None
    if refusal is not None:
        raise refusal
    keep = rows_kept(call, total, seen, planned)
    if keep is not None and keep >= seen and method.restores:
        return 0, None
    spare = max(0, planned - seen) if call.budget is not None else 0
    near = method.restores and call.budget is not None and call.budget.word == "keep_ratio"
    return spare, counts_of(method, shape.tower, patches, keep, grids if near else None)


def _resampled(
    method: InEncoder, family: Family, call: Call, number: int
) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"{method.name} removes rows inside the vision encoder, and {family.name} resamples what "
        f"its encoder gives of {call.modality.name} {number} (pooled frames, a canvas scaled "
        f"down), which needs every patch: use a method that restores rows, one that acts before "
        f"the LLM, or a smaller picture."
    )
