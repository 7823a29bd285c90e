"""What is to hold of methods inside the vision encoder: counts, whole rows, pictures one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...prune.budget import round_tokens
from ...prune.contract import EncoderRows, InEncoder, Reduction, Tower
from .asked import Question, same, tensors_of
from .outcome import Broken


def exact_rows(
    method: InEncoder,
    tower: Tower,
    pictures: Sequence[Sequence[tuple[int, int]]],
    entering: Sequence[tuple[Sequence[int], Sequence[int]]],
    ratio: float,
) -> None:
    """Of a method that restores rows: as many of each image as the budget says are left where the
    last block ends that is read.

    Args:
        pictures: of each image, rows and columns of what the encoder sees.
        entering: `Last.encoder`.
    """
    left = iter(entering[tower.depth_read - 1 - method.blocks(tower)[0].block][1])
    for grids in pictures:
        rows = sum(height * width for height, width in grids)
        inside, wanted = sum(next(left) for _ in grids), round_tokens(ratio, rows)
        if inside != wanted:
            raise Broken(
                f"keep_ratio={ratio} of {rows} rows is {wanted}, and {inside} stayed in the encoder"
            )


def rows_whole(method: InEncoder, question: Question) -> None:
    """No new row is made of nothing, and each holds the row whose number it has."""
    rows: EncoderRows = question.given[0]
    made: Reduction = question.ask(method)
    if made.matrix is not None:
        return  # of which every row may hold something of every other
    if bool((made.sizes(rows.sizes) <= 0).any()):
        raise Broken("reduce leaves a row that no patch is in")
    if made.owner is None:
        return
    held = made.owner.gather(1, made.source.clamp_min(0))
    own = torch.arange(made.count, device=held.device).expand_as(held)
    if bool(((held != own) & (made.source >= 0)).any()):
        raise Broken(
            "reduce returns a `source` whose row goes elsewhere: `owner` at each row of `source` "
            "must be the new row's own place"
        )


def pictures_alone(method: InEncoder, question: Question) -> None:
    """A picture has the same answer alone and beside others."""
    rows, keep = question.given
    made = question.ask(method)
    for at in range(len(rows.numbers)):
        alone = Question(question.call, (_picture(rows, at), keep)).ask(method)
        beside = _of(made, at)
        numbers = [[one.source, one.owner] for one in (alone, beside)]
        shares = [tensors_of([one.weights, one.matrix]) for one in (alone, beside)]
        # Products of a batch may be rounded otherwise.
        both = zip(*shares, strict=True)
        close = all(torch.allclose(one, other, atol=1e-5) for one, other in both)
        if not (same(*numbers) and close):
            raise Broken("reduce makes something else of a picture than of it alone")


def _picture(rows: EncoderRows, at: int) -> EncoderRows:
    one = slice(at, at + 1)
    return replace(
        rows,
        numbers=rows.numbers[one],
        sizes=rows.sizes[one],
        signals={need: value[one] for need, value in rows.signals.items()},
    )


def _of(made: Reduction, at: int) -> Reduction:
    one = slice(at, at + 1)
    return replace(
        made,
        source=made.source[one],
        owner=None if made.owner is None else made.owner[one],
        weights=None if made.weights is None else made.weights[one],
        matrix=None if made.matrix is None else made.matrix[one],
    )
