"""`handle.overlay`: which picture shows what was asked for of `handle.last`."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ...prune.errors import MethodFieldError, NothingToShowError
from ..family import Fit
from ..report import Last, StageReport
from .canvas import on_tiles
from .heat import heat_map
from .overlay import overlay


def show(
    last: Last,
    pictures: Sequence[Image.Image],
    index: int,
    *,
    fit: Fit,
    stage: int | None,
    layer: int | None,
    scores: bool,
    across: int | None,
) -> Image.Image:
    """See `Handle.overlay`."""
    for one in pictures:
        if not isinstance(one, Image.Image):
            raise MethodFieldError(
                f"image={one!r} is no picture: give a PIL image, e.g. Image.open('cat.jpg') of the "
                f"file that was asked about; for a video, a list of its frames."
            )
    if not 0 <= index < len(last.kept):
        raise NothingToShowError(f"index={index}: the last prefill had {len(last.kept)} images.")
    if stage is not None and layer is not None:
        raise MethodFieldError(
            f"stage={stage} and layer={layer} cannot be given together: a stage is a cut of the "
            f"sequence, and layer= shows what a method on the cache left in one layer."
        )
    pictures = on_tiles(pictures, last.tilings[index])
    cut = None if stage is None else _stage(last, stage)
    if layer is not None:
        _check_layer(last, layer)
    if scores:
        return _ranked(last, pictures, index, cut, layer, fit, across)
    if cut is None and last.cache is not None:
        return _stored(last, pictures, index, layer, fit, across)
    kept, rows, members = last.kept, last.order, last.members
    if cut is not None:
        kept, rows, members = cut.kept, cut.rows, cut.members
    return overlay(
        pictures,
        last.tilings[index],
        kept[index],
        fit,
        rows=rows[index],
        members=members[index],
        across=across,
    )


def _stored(
    last: Last,
    pictures: Sequence[Image.Image],
    index: int,
    layer: int | None,
    fit: Fit,
    across: int | None,
) -> Image.Image:
    """How much of each token a method on the cache left."""
    assert last.cache is not None  # noqa: S101  (for the types)
    layers = last.cache.num_layers
    many = "layers that still store a token (mean of key heads)"
    title = many if layer is None else f"share of the key heads of layer {layer} that store a token"
    return heat_map(
        pictures,
        last.tilings[index],
        last.cache.stored(index, layer),
        fit,
        title=title,
        limits=(0, layers if layer is None else 1),
        across=across,
    )


def _ranked(
    last: Last,
    pictures: Sequence[Image.Image],
    index: int,
    cut: StageReport | None,
    layer: int | None,
    fit: Fit,
    across: int | None,
) -> Image.Image:
    """The scores of a cut, of a layer's cache, or of what came last."""
    everything = last.scores  # refuses where they were not recorded
    kept = None
    if cut is not None:
        values, name = (cut.scores or [None] * len(last.kept))[index], cut.method
        where, kept = f"{name} {cut.where}", cut.kept[index]
    elif last.cache is not None and (values := last.cache.ranked(index, layer)) is not None:
        where = "the cache, mean of all layers" if layer is None else f"the cache of layer {layer}"
    else:
        values = everything[index]
        ranking = [s for s in last.stages if s.scores is not None and s.scores[index] is values]
        where = "" if not ranking else f"{ranking[-1].method} {ranking[-1].where}"
        kept = ranking[-1].kept[index] if ranking else None
    if values is None:
        raise NothingToShowError(_no_scores(last, cut))
    title = f"scores of {where}"
    return heat_map(
        pictures, last.tilings[index], values, fit, title=title, kept=kept, across=across
    )


def _no_scores(last: Last, cut: StageReport | None) -> str:
    """Why there are none."""
    names = [cut.method] if cut is not None else list(last.unranked)
    reasons = "; ".join(
        f"{name} {last.unranked.get(name) or 'gave none (it removed nothing, or sets none)'}"
        for name in names
    )
    return f"There are no scores to show: {reasons}. overlay(image) shows what was kept."


def _stage(last: Last, stage: int) -> StageReport:
    if isinstance(stage, int) and 0 <= stage < len(last.stages):
        return last.stages[stage]
    cuts = [f"{number} ({one.method} {one.where})" for number, one in enumerate(last.stages)]
    there = f"made these: {', '.join(cuts)}" if cuts else "made no cut; leave stage out"
    raise NothingToShowError(f"stage={stage!r} is no cut: the last prefill {there}.")


def _check_layer(last: Last, layer: int) -> None:
    if last.cache is None:
        raise NothingToShowError(
            f"layer={layer}: no method on the KV cache removed anything in the last prefill. Cuts "
            f"of the sequence are shown with stage=."
        )
    if not 0 <= layer < last.cache.num_layers:
        raise NothingToShowError(
            f"layer={layer} is no decoder layer: use 0..{last.cache.num_layers - 1}."
        )
