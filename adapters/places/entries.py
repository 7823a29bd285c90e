"""How many entries of its cache a prompt may use, for methods that act there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...prune.budget import entries_kept
from ...prune.errors import BudgetError
from ..cache.pruned import PrunedState
from ..patch_setup import Setup
from ..sequence.placed import PlacedImage


def entries_to_keep(
    setup: Setup, images: Sequence[PlacedImage], text_tokens: Sequence[int]
) -> list[int | None] | None:
    """Per sample, the entries that a method on the cache keeps, None where it does nothing; 0: as
    many as it has published.

    None altogether where it does nothing in any of them, or there is none.
    """
    call, attending = setup.on_cache, setup.attending
    if call is None:
        return None
    keeps: list[int | None] = []
    acts = False
    for sample, text in enumerate(text_tokens):
        own = [image.encoded for image in images if image.sample == sample]
        visual = [image.num_tokens for image in own]
        parts = [entries_kept(image.calls[-1], [image.num_tokens], 0) for image in own]
        keep = None if None in parts else text + sum(part or 0 for part in parts)
        if not visual or (keep is not None and keep >= sum(visual) + text):
            keeps.append(None)
        elif keep is not None and attending is not None and keep <= attending.always:
            raise BudgetError(
                f"{call} leaves {keep} of a prompt's {sum(visual) + text} entries, and {call.name} "
                f"attends to {attending.always} in any case: give a larger budget, or set smaller "
                f"fields ({', '.join(attending.fields())})."
            )
        else:
            keeps.append(keep or 0)
            acts = True
    return keeps if acts else None


def attend_budget(
    state: PrunedState, keeps: list[int | None] | None, repeats: int, stored: int
) -> None:
    """Note how many entries each row attends to while decoding, for methods that evict nothing.

    Text that was cached before the prompt, in `stored` columns, counts as the prompt's does.
    """
    if keeps is not None:
        keep = torch.tensor(
            [-1 if keep is None else keep for keep in keeps for _ in range(repeats)]
        )
        padding = state.segments[0].padding_to(stored)
        before = torch.tensor(stored) if padding is None else padding.sum(1).to(keep.device)
        state.attended = torch.where(keep > 0, keep + before, keep)
