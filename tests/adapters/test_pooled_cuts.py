"""Cuts that pool images: signals are joined in the images' order, and what an earlier cut left
bounds later ones."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from kit import zoo
from kit.decoder_by_hand import Expected
from kit.recorders import (
    CLOSE,
    LAYERS,
    NO_TEXT_BEHIND,
    THREE,
    Recorder,
    Seen,
    declared,
    modes,
    pick,
    ran,
    run,
)
from torch import Tensor
from vlmprune.prune.contract import (
    Cut,
    Place,
    RotaryAffinity,
    Selection,
    Signal,
    TextAttention,
    TextHidden,
    TextKeys,
)

POOLED = (
    Cut(Place.DECODER, 1, 2.0, "context"),
    Cut(Place.DECODER, 2, 1.0, "context"),
    Cut(Place.DECODER, 3, 1.0, "query"),
)
POOLING: tuple[zoo.Row, ...] = (THREE, (4, "B", 2), NO_TEXT_BEHIND, zoo.NONE)


def poolable(layers: Sequence[int] = LAYERS) -> tuple[Signal, ...]:
    """Signals whose shape does not depend on the text behind each image."""
    return tuple(
        want
        for want in declared(layers)
        if not isinstance(want, RotaryAffinity | TextHidden | TextKeys)
        and not (isinstance(want, TextAttention) and want.each)
    )


@functools.cache
def pooled_truth(case, rows, positions) -> tuple[Expected, dict[tuple[int, int], Tensor]]:
    """The reference, and what is chosen of each pool at (layer, row)."""
    totals, cuts = iter(case.counts(rows)), {cut.layer: [] for cut in POOLED}
    pools = {}
    for row, spec in enumerate(rows):
        alive = [torch.arange(next(totals)) for _ in zoo.images([spec])]
        keeps = [round(0.3 * len(one)) for one in alive]
        for cut in POOLED:
            among = range(len(alive) - 1) if cut.images == "context" else range(len(alive))[-1:]
            sizes = [len(alive[i]) for i in among]
            if sizes:
                keep = sum(min(round(keeps[i] * cut.share), keeps[i] * 2) for i in among)
                chosen = pools[cut.layer, row] = pick(cut.layer, sum(sizes), keep)
                start = 0
                for i, size in zip(among, sizes, strict=True):
                    own = chosen[(chosen >= start) & (chosen < start + size)] - start
                    alive[i] = alive[i][own]
                    start += size
            cuts[cut.layer] += alive
    truth = Expected(case, rows, tuple(cuts.items()), [positions] * len(cuts))
    return truth, pools


@zoo.WHOLE
@zoo.ATTENTION
def test_pooled_images(case, attention):
    positions = modes(case)[-1] if attention == "sdpa" else "original"
    recorder = Recorder(wants=poolable(), at=POOLED)
    handle = run(case, attention, POOLING, recorder, positions=positions)
    truth, pools = pooled_truth(case, POOLING, positions)
    tilings = case.tilings(POOLING)
    assert len(recorder.seen) == len(pools) == 2 * 2 + 3
    for ((layer, row), chosen), one in zip(sorted(pools.items()), recorder.seen, strict=True):
        spec, tokens = truth.truth.rows[row], one.tokens
        assert tokens.layer == layer and torch.equal(one.chosen, chosen)
        among = slice(-1, None) if layer == 3 else slice(-1)
        images = spec.images[among]
        before = truth.rows[row][layer].before.places
        alive = [torch.isin(image, before).nonzero()[:, 0] for image in images]
        assert torch.equal(tokens.alive, torch.cat(alive))
        assert tokens.num_tokens == len(tokens.alive)
        blocks = [block for number in spec.numbers[among] for block in tilings[number].blocks]
        assert list(tokens.tiling.blocks) == blocks
        assert set(tokens.signals) == ran(recorder.wants, (1, 2, 3), layer)
        for want, value in tokens.signals.items():
            parts = [
                truth.signal(want, row, image, image[own])
                for image, own in zip(images, alive, strict=True)
            ]
            wanted = torch.cat(parts) if want.per == "token" else parts[0]
            torch.testing.assert_close(value, wanted, **CLOSE)
    for stage, (layer, kept) in zip(handle.last.stages, truth.truth.cuts, strict=True):
        assert stage.layer == layer
        assert all(torch.equal(a, b) for a, b in zip(stage.kept, kept, strict=True))
    split = [sum(len(kept[i]) for i in (0, 1)) for _, kept in truth.truth.cuts]
    assert split[0] > split[1] == split[2], "the first two images of the first prompt are pooled"


@dataclass(frozen=True, kw_only=True)
class Greedy(Recorder):
    """Keeps the first tokens of a pool; the adaptive cut leaves every other image nothing."""

    def select(self, tokens, keep):
        self.seen.append(Seen(tokens, torch.arange(keep)))
        return Selection(kept=torch.arange(keep))

    def select_adaptive(self, tokens):
        return self.select(tokens, 3 * (len(self.of(tokens.layer)) % 2))


@zoo.BOTH_FAMILIES
def test_what_an_earlier_cut_left_bounds_later_ones(case):
    """A pool may be taken from one image, an adaptive cut may leave nothing."""
    counts = case.counts(POOLING)
    for at in (
        (Cut(Place.DECODER, 1, 2.0, "context"), Cut(Place.DECODER, 3)),
        (Cut(Place.DECODER, 1, adaptive=True), Cut(Place.DECODER, 2, 1.5), Cut(Place.DECODER, 3)),
    ):
        recorder = Greedy(wants=poolable(), at=at)
        last = run(case, "sdpa", POOLING, recorder).last
        keeps = [round(0.3 * n) for n in counts]
        if at[0].adaptive:
            assert [len(kept) for kept in last.kept] == [0, 3, 0, 3, 0, 3]
            assert len(recorder.seen) == len(counts), "what is left is no choice any more"
        else:
            pool = 2 * (keeps[0] + keeps[1])
            left = [min(counts[0], pool), max(0, pool - counts[0])]
            assert [len(kept) for kept in last.stages[0].kept[:2]] == left
            assert [len(kept) for kept in last.kept[:2]] == list(map(min, keeps, left))
        for seen in recorder.seen:
            assert all(value.isfinite().all() for value in seen.tokens.signals.values())
