"""From what a handle reports to what the oracle must be told: the cuts of a `Truth`."""

from __future__ import annotations

import torch
import vlmprune
import zoo
from oracle import Rows, Truth
from vlmprune.prune.contract import BeforeLLM

TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}
"""Peaky random weights amplify rounding: the two orders of operations differ by about 1e-5."""


def features_of(model, inputs: dict) -> list[torch.Tensor]:
    """Features of each image as the model's public encoder functions give them: (N, D)."""
    return [row.embeds[image] for row in Truth(model, inputs).rows for image in row.images]


def rows_that_enter(case: zoo.Case, inputs: dict, model, handle) -> list[Rows]:
    """Of each image, the rows that a method before the LLM lets in: their tokens as the handle
    reports them, their embeddings from the encoder functions of the patched model.

    Rows that were not merged must be their tokens' features on the unpatched model.
    """
    last, found = handle.last, []
    dense = features_of(case.reference(model.config._attn_implementation), inputs)
    for i, given in enumerate(features_of(model, inputs)):
        order = last.kept[i] if last.order[i] is None else last.order[i]
        embeds = given[Rows(order).slots(len(given))]
        own = order >= 0
        if (groups := last.groups[i]) is not None:
            own &= torch.tensor([not len(members) for members in groups])
        torch.testing.assert_close(embeds[own], dense[i][order[own]], **TOLERANCE)
        found.append(Rows(order, embeds))
    return found


def truth_of(case: zoo.Case, inputs: dict, model, handle) -> Truth:
    """What a patched model must compute of the inputs that it saw last."""
    last, reference = handle.last, case.reference("eager")
    if not _moved_or_merged(last):
        return Truth(reference, inputs, [(s.layer, s.kept) for s in last.stages], last.positions)
    first, *later = handle.methods
    assert isinstance(first.method, BeforeLLM)
    if later:
        model = case.model()
        handle = vlmprune.patch(model, first, positions=last.positions)
        with torch.no_grad():
            model(**inputs)
    cuts = [(0, rows_that_enter(case, inputs, model, handle))]
    for stage in last.stages[1:]:
        truth = Truth(reference, inputs, cuts, last.positions)
        counts = [
            next((s.keep for s in reversed(plan) if s.layer <= stage.layer), n)
            for plan, n in zip(last.plans, last.tokens_in, strict=True)
        ]
        cuts = [*cuts, (stage.layer, _slots_alive(truth, stage, counts))]
    return Truth(reference, inputs, cuts, last.positions)


def _moved_or_merged(last) -> bool:
    return any(order is not None for order in last.order) or any(
        groups is not None for groups in last.groups
    )


def _slots_alive(truth: Truth, stage, counts: list[int]) -> list[torch.Tensor]:
    """The slots of the tokens that a later cut reports. Of rows that are no token it reports none:
    as many as the count says are taken, those that the last token reads most."""
    (_, entered), *_ = truth.cuts
    scores = [s for b in range(len(truth.rows)) for s in truth.last_row(b, stage.layer - 1)]
    sizes = [len(image) for row in truth.rows for image in row.images]
    places = [row.images for row in truth.rows]
    rows = [(b, i) for b, images in enumerate(places) for i in range(len(images))]
    found = []
    for n, (b, i) in enumerate(rows):
        slots = entered[n].slots(sizes[n])
        before = truth.alive(b, stage.layer - 1)[places[b][i][slots]]
        order, slots = entered[n].order[before], slots[before]
        keep = torch.isin(order, stage.kept[n])
        extra = counts[n] - len(stage.kept[n])
        best = scores[n].masked_fill(order >= 0, -1).topk(extra).indices
        found.append(slots[keep.index_fill(0, best, True)])
    return found
