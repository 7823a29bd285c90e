"""random_encoder: drawn from the seed and the places alone, evenly, nested from cut to cut."""

from dataclasses import replace

import pytest
import torch
from kit import inside
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.registry import method, method_class

RANDOM = method_class("random_encoder")
TOWER = inside.TOWERS["clip"]


def kept(seed: int, count: int = 64, keep: int = 16) -> list[int]:
    chooser = RANDOM(seed=seed)
    made = inside.checked(chooser, inside.drawn(chooser, TOWER, count), keep)
    assert made.owner is None and made.source[0].tolist() == made.source[1].tolist()
    return made.source[0].tolist()


def mixed(number: int) -> int:
    """The last step of MurmurHash3, in whole numbers of any size."""
    number %= 2**32
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        number = (number ^ (number >> shift)) * factor % 2**32
    return number ^ (number >> 16)


@pytest.mark.parametrize("seed", [0, 1, -1, 12345678901])
def test_random_encoder_of_a_seed(seed):
    """Whole numbers alone: no generator, whose streams may change."""
    drawn = [mixed(mixed(place + 1) + seed * 0x9E3779B9) for place in range(500)]
    assert kept(seed, 500, 99) == sorted(sorted(range(500), key=drawn.__getitem__)[:99])
    assert kept(seed, 500, 99) != kept(seed + 1, 500, 99)


def test_random_encoder_follows_the_places_of_rows():
    """A row stays or leaves wherever it stands, and whatever other cuts have left."""
    rows = inside.drawn(RANDOM(), TOWER, 40)
    whole = RANDOM().reduce(rows, 10).source
    turned = replace(rows, numbers=rows.numbers.flip(1))
    assert torch.equal(RANDOM().reduce(turned, 10).source, (39 - whole).flip(1))
    some = RANDOM().reduce(rows, 25).source
    left = replace(rows, numbers=rows.numbers.gather(1, some), sizes=torch.ones(2, 25))
    assert torch.equal(some.gather(1, RANDOM().reduce(left, 10).source), whole)


def test_random_encoder_draws_evenly():
    """Over 400 seeds each of 64 places stays 100 times, within five standard deviations, and so do
    pairs of neighbours."""
    drawn = torch.zeros(400, 64)
    for seed in range(400):
        drawn[seed, kept(seed)] = 1
    assert (drawn.sum(0) - 100).abs().max() < 5 * (400 * 0.25 * 0.75) ** 0.5
    pairs = (drawn[:, 1:] * drawn[:, :-1]).sum(0)
    chance = 16 * 15 / (64 * 63)
    assert (pairs - 400 * chance).abs().max() < 5 * (400 * chance * (1 - chance)) ** 0.5


@pytest.mark.parametrize("tower", sorted(inside.TOWERS))
def test_random_encoder_cuts_where_evit_does(tower):
    tower = inside.TOWERS[tower]
    assert RANDOM().blocks(tower) == method_class("evit")().blocks(tower)
    for keep in (1, 57, 300):
        evit = method_class("evit")()
        assert RANDOM().block_counts(tower, 576, keep) == evit.block_counts(tower, 576, keep)


def test_random_encoder_needs_a_budget():
    with pytest.raises(BudgetError, match="random_encoder needs a budget"):
        method("random_encoder")
    with pytest.raises(MethodFieldError, match="give a whole number"):
        RANDOM(seed=0.5)
