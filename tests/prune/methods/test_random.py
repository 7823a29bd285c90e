"""random: depends on the seed and the picture alone."""

import math

import torch
from kit.drawn import select, shape_of
from vlmprune.prune.contract import PixelSeed, VisualTokens
from vlmprune.prune.tiling import Tiling


def test_random_depends_on_seed_and_picture_alone():
    def kept(pixel_seed: int, seed: int = 0, grid: tuple[int, int] = (20, 20)) -> list[int]:
        tokens = VisualTokens(
            num_tokens=math.prod(grid),
            tiling=Tiling.single(*grid),
            shape=shape_of(),
            signals={PixelSeed(): torch.tensor(pixel_seed)},
        )
        return select("random", tokens, 40, seed=seed).tolist()

    assert kept(5) == kept(5)
    # pictures, and seeds, that differ in high or low bits, or that only add up to the same
    choices = [kept(5), kept(6), kept(5 + 2**40), kept(-5), kept(5, seed=1), kept(4, seed=1)]
    choices += [kept(5, seed=2**40), kept(15), kept(1, seed=5), kept(5, seed=-1)]
    assert len({tuple(choice) for choice in choices}) == len(choices)


def test_random_is_uniform():
    hits, choices = torch.zeros(50), set()
    for pixel_seed in range(400):
        tokens = VisualTokens(
            num_tokens=50,
            tiling=Tiling.single(5, 10),
            shape=shape_of(),
            signals={PixelSeed(): torch.tensor(pixel_seed)},
        )
        kept = select("random", tokens, 10)
        hits[kept] += 1
        choices.add(tuple(kept.tolist()))
    # 400 draws at 1/5: mean 80, standard deviation 8
    assert len(choices) == 400
    assert hits.min() > 80 - 5 * 8
    assert hits.max() < 80 + 5 * 8
