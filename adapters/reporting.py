"""Parts of `handle.last` that are the same with an LLM and without."""

from __future__ import annotations

from collections.abc import Sequence

from ..prune.budget import MethodCall, remark
from ..prune.contract import LayerSignal, Place, Pruning, Selection
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


def states_remark(setup: Setup) -> str | None:
    """Where methods that read attention read it and cut, in a decoder where few layers have it."""
    decoder = setup.shape.decoder
    if decoder.attention_layers is None:
        return None
    said = []
    for call in setup.calls:
        needs = [n for n in call.method.needs(setup.shape) if isinstance(n, LayerSignal)]
        read = sorted({need.layer for need in needs if need.of_attention})
        cuts = [] if not isinstance(call.method, Pruning) else call.method.cuts(setup.shape)
        inside = [cut.layer for cut in cuts if cut.place is Place.DECODER]
        if read and inside:
            said.append(
                f"{call.name} reads attention of layers {read} and cuts at layers {inside}: of "
                f"this decoder only layers {[*decoder.attending]} have attention."
            )
    return " ".join(said) or None


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
