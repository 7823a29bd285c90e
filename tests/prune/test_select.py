"""One image, one method, one count: newlines, tiles, orders and merged rows find their places."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from vlmprune.prune.contract import (
    BeforeLLM,
    ClsFeatures,
    Cut,
    Decoder,
    Features,
    InDecoder,
    ModelShape,
    PixelSeed,
    Place,
    Selection,
    Signal,
    Tower,
    VisualTokens,
)
from vlmprune.prune.errors import BudgetError, VlmpruneError
from vlmprune.prune.ops.spread import share
from vlmprune.prune.select import most, select
from vlmprune.prune.tiling import Block, Tiling

SHAPE = ModelShape(
    tower=Tower(num_layers=24, has_cls=True),
    decoder=Decoder(num_layers=32, hidden_size=64, intermediate_size=128),
)
KINDS = ("plain", "ordered", "merging", "partly merging", "adding")


@dataclass(frozen=True, kw_only=True)
class Fake(BeforeLLM):
    """Chooses at random and says so: `log` has, per call, its rows as (token, feature, members).

    Tokens are known by their feature, which is their number in the image. A merged row's feature is
    negative, and that of a row that stands for no token is fractional.
    """

    name = "fake"
    newline_policies = ("drop", "keep", "compete")
    scopes = ("tile", "image")
    finds_count = True

    kinds: tuple[str, ...] = ("plain",)
    seed: int = 0
    log: list = field(default_factory=list, compare=False)

    def needs(self, shape):
        return (Features(),)

    def select(self, tokens, keep):
        return self._select(tokens, keep, random.Random(self.seed + len(self.log)))

    def select_adaptive(self, tokens):
        rng = random.Random(self.seed + len(self.log))
        return self._select(tokens, rng.randint(1, self.most(tokens.num_tokens)), rng)

    def most(self, num_tokens):
        return num_tokens // 2 + 1

    def _select(self, tokens, keep, rng):
        kind = rng.choice(self.kinds)
        numbers = tokens.signals[Features()][:, 0].long().tolist()
        assert len(numbers) == tokens.num_tokens
        added = rng.randint(1, keep) if kind == "adding" else 0
        order = rng.sample(range(tokens.num_tokens), keep - added) + [-1] * added
        if kind in ("ordered", "adding"):
            rng.shuffle(order)
        else:
            order.sort()
        merged = {
            "merging": range(keep),
            "partly merging": rng.sample(range(keep), rng.randint(0, keep)),
            "adding": [r for r in range(keep) if order[r] < 0 or rng.random() < 0.5],
        }.get(kind, [])
        features = {
            r: -numbers[order[r]] - 1 if order[r] >= 0 else numbers[0] + (r + 1) / 1024
            for r in merged
        }
        grouped = range(keep if kind != "plain" else 0)
        pairs = [(r, t) for r in grouped for t in range(len(numbers)) if rng.random() < 0.4]
        members = {r: [numbers[t] for row, t in pairs if row == r] for r in range(keep)}
        names = [numbers[token] if token >= 0 else -1 for token in order]
        rows = [(name, features.get(r, name), members[r]) for r, name in enumerate(names)]
        self.log.append((kind, rows))
        return Selection(
            kept=whole(sorted(token for token in order if token >= 0)),
            order=whole(order) if kind in ("ordered", "adding") else None,
            features=torch.tensor([[float(features[r])] for r in merged]) if merged else None,
            rows=whole(merged) if merged and kind != "merging" else None,
            projected=bool(merged),
            groups=whole(pairs).view(-1, 2).T if grouped else None,
        )


def whole(numbers) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64)


def tokens_of(
    tiling: Tiling, policy: str, more: Mapping[Signal, torch.Tensor] | None = None
) -> VisualTokens:
    """Every token is known by its feature, its number in the image."""
    cpu = torch.device("cpu")
    numbers = torch.arange(tiling.num_tokens) if policy == "compete" else tiling.patches(cpu)
    return VisualTokens(
        num_tokens=tiling.num_tokens,
        tiling=tiling,
        shape=SHAPE,
        signals={Features(): numbers[:, None].float()} | (more or {}),
    )


def rows_of(selection: Selection) -> list:
    """(token, feature, members) of each row, as an adapter would enter them."""
    order = selection.kept if selection.order is None else selection.order
    features = order.float()[:, None].clone()
    entered = order >= 0
    if selection.features is not None:
        rows = selection.rows
        rows = torch.arange(len(order)) if rows is None else rows
        assert len(rows.unique()) == len(rows) == len(selection.features)
        features[rows] = selection.features.float()
        entered[rows] = True
    assert entered.all(), "a row that stands for no token has a feature"
    members: list[list[int]] = [[] for _ in order]
    if selection.groups is not None:
        assert (selection.groups[0].diff() >= 0).all()
        for row, token in selection.groups.T.tolist():
            members[row].append(token)
    listed = zip(order.tolist(), features[:, 0].tolist(), members, strict=True)
    return [(token, feature, sorted(group)) for token, feature, group in listed]


def expected_rows(method: Fake, tiling: Tiling, keep: int | None) -> list:
    """What the calls in the log amount to, worked out row by row."""
    cpu, log = torch.device("cpu"), iter(method.log)
    patches, newlines = tiling.patches(cpu).tolist(), tiling.newlines(cpu).tolist()
    if method.newline_policy == "compete":
        patches, newlines = sorted(patches + newlines), []
    if method.newline_policy == "drop":
        newlines = newlines[: max(0, (keep or 0) - len(patches))]
    budget = None if keep is None else keep - len(newlines)
    tiles = [list(range(len(patches)))]
    if method.scope_used == "tile":
        tiles = [places.tolist() for places in tiling.tile_patches(cpu)]
    counts = [None] * len(tiles) if keep is None else share(budget, list(map(len, tiles)))
    rows, ordered = [], False
    for tile, count in zip(tiles, counts, strict=True):
        if count == len(tile):
            rows += [(patches[i], patches[i], []) for i in tile]
        elif count != 0:
            kind, found = next(log)
            ordered |= kind in ("ordered", "adding")
            rows += found
    assert next(log, None) is None, "the method was asked once too often"
    if not ordered:
        rows.sort()
    arranged, farthest = [], -1
    for row in rows:
        farthest = max(farthest, row[0])
        while newlines and newlines[0] < farthest:
            arranged.append((newlines[0], newlines.pop(0), []))
        arranged.append(row)
    return [(t, f, sorted(g)) for t, f, g in arranged + [(n, n, []) for n in newlines]]


sizes = st.lists(st.integers(0, 3), min_size=1, max_size=2).map(tuple)
blocks = st.builds(Block, sizes, sizes, st.sampled_from(["none", "rows", "end"]))
tilings = (
    st.lists(blocks, min_size=1, max_size=3)
    .map(lambda found: Tiling(tuple(found)))
    .filter(lambda tiling: tiling.num_patches > 0)
)
kinds_of_tiles = st.lists(st.sampled_from(KINDS), min_size=1, max_size=3).map(tuple)


@pytest.mark.parametrize(
    ("newlines", "scope"),
    [
        ("drop", "tile"),
        ("drop", "image"),
        ("keep", "tile"),
        ("keep", "image"),
        ("compete", "image"),
    ],
)
@settings(max_examples=100)
@given(tilings, kinds_of_tiles, st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
def test_every_row_finds_its_place(newlines, scope, tiling, kinds, part, adaptive, seed):
    keep = None if adaptive else max(1, round(part * tiling.num_tokens))
    assume(keep is None or newlines != "keep" or keep > tiling.num_newlines)
    method = Fake(newlines=newlines, scope=scope, kinds=kinds, seed=seed)
    selection = select(method, tokens_of(tiling, newlines), keep)
    if keep is not None:
        assert selection.count == keep
    kept = selection.kept.tolist()
    assert kept == sorted(set(kept))
    if selection.order is not None:
        assert sorted(t for t in selection.order.tolist() if t >= 0) == kept
    assert selection.projected == (selection.features is not None)
    assert rows_of(selection) == expected_rows(method, tiling, keep)


def canvas() -> Tiling:
    """A thumbnail of 2 x 2 and a canvas of 2 x (1 + 2), each row of which ends in a newline:

    0 1    4 | 5  6  (7)
    2 3    8 | 9 10 (11)
    """
    return Tiling((Block((2,), (2,)), Block((2,), (1, 2), newline="rows")))


def test_a_canvas_by_hand():
    """Three tiles of 4, 2 and 4 patches; all but the second one are asked for their shares."""

    @dataclass(frozen=True, kw_only=True)
    class LastFirst(BeforeLLM):
        """The last tokens in descending order, then their mean."""

        name = "last_first"

        def needs(self, shape):
            return (Features(),)

        def select(self, tokens, keep):
            order = torch.arange(tokens.num_tokens).flip(0)[: keep - 1]
            mean = tokens.signals[Features()][order].mean(0, keepdim=True)
            return Selection(
                kept=order.sort().values,
                order=torch.cat([order, order.new_tensor([-1])]),
                features=mean,
                rows=torch.tensor([keep - 1]),
                projected=True,
                groups=torch.stack([torch.full_like(order, keep - 1), order]),
            )

    selection = select(LastFirst(newlines="drop"), tokens_of(canvas(), "drop"), 8)
    assert selection.order.tolist() == [3, 2, -1, 4, 8, 10, 9, -1]
    assert selection.kept.tolist() == [2, 3, 4, 8, 9, 10]
    assert selection.rows.tolist() == [2, 7]
    assert selection.features.tolist() == [[2.5], [9.5]]
    assert selection.groups.tolist() == [[2, 2, 7, 7], [3, 2, 10, 9]]

    selection = select(LastFirst(newlines="keep"), tokens_of(canvas(), "keep"), 10)
    assert selection.order.tolist() == [3, 2, -1, 4, 7, 8, 10, 9, -1, 11]
    assert selection.kept.tolist() == [2, 3, 4, 7, 8, 9, 10, 11]
    assert selection.rows.tolist() == [2, 8]
    assert selection.groups.tolist() == [[2, 2, 8, 8], [3, 2, 10, 9]]


def test_signals_of_a_tile():
    """Per token its own rows, per tile its one row, per image as they are."""
    asked = []

    @dataclass(frozen=True, kw_only=True)
    class Asks(BeforeLLM):
        name = "asks"

        def needs(self, shape):
            return (Features(), ClsFeatures(), PixelSeed())

        def select(self, tokens, keep):
            seen = tuple(t.flatten().tolist() for t in tokens.signals.values())
            asked.append((tokens.tile, tokens.grid, *seen))
            return Selection(kept=torch.arange(keep))

    more = {ClsFeatures(): torch.tensor([[70.0], [71], [72]]), PixelSeed(): torch.tensor(5)}
    select(Asks(), tokens_of(canvas(), "drop", more), 5)
    assert asked == [
        (0, (2, 2), [0, 1, 2, 3], [70], [5]),
        (1, (2, 1), [4, 8], [71], [5]),
        (2, (2, 2), [5, 6, 9, 10], [72], [5]),
    ]


def test_a_budget_that_newlines_use_up():
    method, tokens = Fake(newlines="keep"), tokens_of(canvas(), "keep")
    with pytest.raises(BudgetError, match=r"all 2 newline tokens.*keep_tokens=3"):
        select(method, tokens, 2)
    assert {7, 11} < set(select(method, tokens, 3).kept.tolist())


def test_a_wrong_count_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class TooFew(InDecoder):
        name = "too_few"

        def needs(self, shape):
            return ()

        def cuts(self, shape):
            return (Cut(Place.DECODER, 1),)

        def select(self, tokens, keep):
            return Selection(kept=torch.arange(keep - 1))

    with pytest.raises(
        VlmpruneError, match=r"too_few.select returned 2 tokens \(kept\) for a count of 3"
    ):
        select(TooFew(), tokens_of(canvas(), "drop"), 3)


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=9), st.floats(0, 1))
def test_shares_are_exact_and_proportional(sizes, part):
    total = round(part * sum(sizes))
    counts = share(total, sizes)
    assert sum(counts) == total
    for count, size in zip(counts, sizes, strict=True):
        assert 0 <= count <= size
        assert abs(count - total * size / sum(sizes)) < 1


def test_shares_left_over_go_to_the_largest_remainders():
    assert share(10, [576, 576, 576]) == [4, 3, 3]
    assert share(10, [30, 50, 20, 1]) == [3, 5, 2, 0]
    assert share(3, [1, 4, 3]) == [0, 2, 1]


@pytest.mark.parametrize(
    ("fields", "bound"),
    [
        ({}, 3 + 2 + 3),
        ({"newlines": "keep"}, 3 + 2 + 3 + 2),
        ({"scope": "image"}, 6),
        ({"scope": "image", "newlines": "keep"}, 6 + 2),
        ({"scope": "image", "newlines": "compete"}, 7),
    ],
)
def test_most_of_an_image_is_summed_over_its_tiles(fields, bound):
    assert most(Fake(**fields), canvas()) == bound
