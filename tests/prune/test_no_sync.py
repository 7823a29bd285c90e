"""A choice does not wait for the device: the host reads no value of a tensor, and no size depends
on one. On a GPU either would stop the host until all work queued before it is done.
"""

import pytest
import torch
from kit.drawn import CHOICES, TILINGS, at, make_tokens
from vlmprune.eval.checking.waiting import WaitsError, no_waiting
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Tiling


def cases():
    """Choices by a budget, before the LLM and in the decoder, of plain and tiled images."""
    for choice in CHOICES:
        yield choice, (12, 12)
        if "@" not in choice:
            yield choice, "2 x 2"
            yield choice, "video"


@pytest.mark.parametrize(("choice", "image"), list(cases()))
def test_a_choice_does_not_wait_for_the_device(choice, image):
    method, layer = at(choice)
    tiling = TILINGS[image] if isinstance(image, str) else Tiling.single(*image)
    tokens = make_tokens(method, tiling, layer=layer)
    keep = max(1, tokens.num_tokens // 3)
    expected = select(method, tokens, keep)  # what depends on the tiling alone is made once
    own = [other for other in CHOICES if at(other)[0].name == method.name]
    if method.waits and choice == own[0]:  # and at no later cut
        with pytest.raises(WaitsError, match="waits"), no_waiting():
            select(method, tokens, keep)
        return
    with no_waiting():
        found = select(method, tokens, keep)
    assert torch.equal(found.kept, expected.kept)


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: torch.arange(3).repeat_interleave(x.long()),
    ],
    ids=["item", "bool", "nonzero", "mask", "tolist", "repeat_interleave"],
)
def test_waiting_is_noticed(waiting):
    with pytest.raises(WaitsError, match="waits"), no_waiting():
        waiting(torch.ones(3))
