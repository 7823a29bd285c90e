"""From what the caller typed to what calls run with."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from ..prune.budget import BUDGET_WORDS, MethodCall, idle, plan
from ..prune.contract import Place, Positions
from ..prune.errors import (
    BudgetError,
    MethodFieldError,
)
from ..prune.registry import method as make_call
from .checks.decoder import check_decoder, check_together
from .checks.patches import check_clip, check_encoder, check_memory, check_signals
from .clip_text import ClipText
from .family import Family
from .patch_setup import Setup, Ticket


def calls_of(
    method: str | MethodCall | Sequence[str | MethodCall], given: dict[str, object]
) -> tuple[MethodCall, ...]:
    """The methods to run, ordered by depth."""
    if isinstance(method, str):
        return (make_call(method, **given),)
    if given:
        raise (BudgetError if any(k in BUDGET_WORDS for k in given) else MethodFieldError)(
            f"{', '.join(given)} cannot be given beside a method object or a list: put them "
            f'inside, e.g. vlmprune.method("divprune", keep_ratio=0.5).'
        )
    listed = list(method) if isinstance(method, Iterable) else [method]
    if not listed:
        raise MethodFieldError("An empty list of methods: name at least one of vlmprune.methods().")
    calls = [make_call(one) if isinstance(one, str) else one for one in listed]
    for call in calls:
        if not isinstance(call, MethodCall):
            raise MethodFieldError(
                f"{call!r} is no method: give a name, vlmprune.method(...), or a list of these; "
                f"a budget with its word, e.g. keep_ratio=0.25."
            )
    for place in Place:
        same = [call.name for call in calls if place in call.method.places]
        if len(same) > 1:
            raise MethodFieldError(
                f"{' and '.join(same)} all act {place.value}: combine methods that act at "
                f"different places, e.g. one before the LLM and one in the decoder."
            )
    return tuple(sorted(calls, key=lambda call: call.method.place))


def make_setup(
    model: nn.Module,
    family: Family,
    calls: tuple[MethodCall, ...],
    positions: Positions | None,
    clip: ClipText | None,
    remember_images: int,
) -> Setup:
    """What calls with these methods run with, if the model allows them."""
    shape = family.shape
    check_encoder(calls, family)
    for call in calls:
        check_signals(call, family, clip)
        check_decoder(call, family)
    check_together(calls, shape)
    modes = _positions_of(family, calls, positions)
    if (tokens := family.fixed_tokens) is not None:
        plan(tokens, calls, shape)  # a budget out of reach is an error now, not at the first image
    if clip is not None:
        check_clip(clip, family, model)
    check_memory(remember_images, calls, family)
    for said in idle(calls):
        warnings.warn(said, UserWarning, stacklevel=3)
    return Setup(
        calls,
        shape,
        modes,
        family.text_model,
        Ticket(),
        turn=family.turned,
        rotates=family.rotates,
        names=family.layer_names,
        by_token=family.by_token,
        clip=clip,
        projectors=len(family.projectors),
    )


def _positions_of(
    family: Family, calls: tuple[MethodCall, ...], wanted: Positions | None
) -> dict[Place, Positions]:
    """The mode at every place where a method acts."""
    if wanted not in (None, "original", "repacked"):
        raise MethodFieldError(f'positions={wanted!r} is unknown: use "original" or "repacked".')
    if family.mrope and wanted == "repacked":
        raise MethodFieldError(
            f'positions="repacked" has no meaning for {family.name}, whose rotary positions '
            f'have several axes (M-RoPE): leave positions out or use "original".'
        )
    own: Positions | None = "original" if family.mrope else wanted
    return {place: own or call.method.positions for call in calls for place in call.method.places}
