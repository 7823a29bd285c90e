"""Parts of `handle.last` that are the same with an LLM and without."""

from __future__ import annotations

from collections.abc import Sequence

from ..prune.budget import MethodCall, remark
from ..prune.contract import Place, Selection
from .patch_setup import Setup
from .report import StageReport


def layers_read(setup: Setup) -> dict[str, list[int]]:
    """Layers that each method reads on this model, by signal."""
    read: dict[str, list[int]] = {}
    for call in setup.calls:
        for need in call.method.needs(setup.shape):
            if hasattr(need, "layer"):
                read.setdefault(f"{call.name}: {type(need).__name__}", []).append(need.layer)
    return read


def in_encoder(setup: Setup, left: Sequence[Selection]) -> StageReport:
    """What left inside the vision encoder, image by image."""
    (name,) = [call.name for call in setup.calls if call.method.place is Place.ENCODER]
    return StageReport(
        name,
        Place.ENCODER,
        0,
        [one.kept for one in left],
        setup.positions[Place.ENCODER],
        order=[one.order for one in left],
        groups=[one.groups for one in left],
        scores=[None for _ in left] if setup.record else None,
        rows=[one.order for one in left],
        members=[one.groups for one in left],
    )


def remarks(images: Sequence[tuple[int, Sequence[MethodCall]]]) -> str | None:
    """What the report says of the budgets of images (their tokens, and the methods), each thing
    once."""
    said = (remark(call, tokens) for tokens, calls in images for call in calls)
    return " ".join(dict.fromkeys(filter(None, said))) or None
