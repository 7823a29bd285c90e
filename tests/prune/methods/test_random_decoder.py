"""random_decoder: drawn from the seed and the tokens' own numbers, nested from cut to cut."""

import pytest
import torch
from kit.decoder import at_cut, stages
from vlmprune.prune.contract import Hidden
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import method, method_class

RANDOM = method_class("random_decoder")


def kept(alive: torch.Tensor, seed: int = 0, keep: int = 10) -> torch.Tensor:
    tokens = at_cut({Hidden(2): torch.zeros(len(alive), 1)}, layer=2, alive=alive)
    return RANDOM(seed=seed).select(tokens, keep).kept


def test_random_decoder_follows_the_numbers_of_tokens():
    """Behind other cuts the same tokens are ahead; another seed draws others."""
    whole = kept(torch.arange(100))
    alive = torch.cat([whole, torch.arange(100)[50:]]).unique()
    left = kept(alive)
    assert torch.equal(alive[left], whole) and torch.equal(whole, whole.unique())
    assert not torch.equal(kept(torch.arange(100), seed=1), whole)


def test_random_decoder_cuts_where_it_is_told_to():
    for layer, cut in ((3, 3), (-1, 31)):
        assert stages(method("random_decoder", layer=layer, keep_tokens=9)) == [(cut, 9)]
    for layer in (0, -32, 32):
        with pytest.raises(MethodFieldError, match="layer"):
            stages(method("random_decoder", layer=layer, keep_tokens=9))


def test_random_decoder_needs_whole_numbers():
    for field in ("layer", "seed"):
        with pytest.raises(MethodFieldError, match=r"whole number|first decoder layer"):
            RANDOM(**{field: 0.5})
