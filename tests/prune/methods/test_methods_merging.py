"""Methods that merge tokens: pool, visionzip, prumerge, prumerge_plus."""

import math
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import avg_pool2d, cosine_similarity
from vlmprune.prune.contract import (
    ClsAttention,
    ClsAttentionOneHead,
    ClsFeatures,
    Decoder,
    EncoderFeatures,
    Features,
    Keys,
    ModelShape,
    ReceivedAttention,
    Tower,
    VisualTokens,
)
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.ops.merge import bags, complement, top_set
from vlmprune.prune.ops.spread import even_shares, lattice_rows, share
from vlmprune.prune.ops.topk import top_k
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import most, select
from vlmprune.prune.tiling import Block, Tiling

SHAPE = ModelShape(
    tower=Tower(num_layers=24, has_cls=True),
    decoder=Decoder(num_layers=32, hidden_size=8, intermediate_size=16),
)
CPU = torch.device("cpu")
CANVAS = Tiling((Block((4,), (4,)), Block((2, 4), (4, 3), newline="rows")))
"""A thumbnail of 16 patches, and a canvas of four tiles: 8 + 6 + 16 + 12 patches, 6 newlines."""
METHODS = [
    ("pool", {}),
    ("visionzip", {}),
    ("visionzip", {"scores": "received", "contextual": 0.4}),
    ("visionzip", {"contextual": 0.0}),
    ("visionzip", {"contextual": 1.0}),
    ("visionzip", {"scores": "received", "contextual": 1.0}),
    ("prumerge", {}),
    ("prumerge", {"scores": "received", "neighbours": 3}),
    ("prumerge", {"neighbours": 0}),
    ("prumerge_plus", {}),
    ("prumerge_plus", {"scores": "received", "neighbours": 3}),
]
every_method = pytest.mark.parametrize(("name", "fields"), METHODS, ids=str)


def draw(signal, tiling: Tiling, generator: torch.Generator) -> torch.Tensor:
    count = len(tiling.tiles) if signal.per == "tile" else tiling.num_patches
    match signal:
        case Keys():
            return torch.randn(count, 2, 3, generator=generator)
        case Features() | EncoderFeatures() | ClsFeatures():
            return torch.randn(count, 5, generator=generator)
        case ClsAttention() | ClsAttentionOneHead():
            return torch.randn(count, generator=generator).mul(2).softmax(0)
        case ReceivedAttention():
            return torch.rand(count, generator=generator) * 2
    raise NotImplementedError(f"{signal}: say here how a random one is drawn")


def make(chooser, tiling: Tiling, *, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    signals = {signal: draw(signal, tiling, generator) for signal in chooser.needs(SHAPE)}
    return VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=SHAPE, signals=signals)


def given_signals(chooser, tiling: Tiling, *values: torch.Tensor) -> VisualTokens:
    signals = dict(zip(chooser.needs(SHAPE), values, strict=True))
    return VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=SHAPE, signals=signals)


def check(selection, num_tokens: int, keep: int) -> None:
    """What every selection must hold."""
    assert selection.count == keep
    kept = selection.kept.tolist()
    assert kept == sorted(set(kept))
    assert kept
    assert set(kept) <= set(range(num_tokens))
    order = selection.kept if selection.order is None else selection.order
    assert order.dtype == torch.int64
    assert sorted(token for token in order.tolist() if token >= 0) == kept
    rows = list(range(keep)) if selection.rows is None else selection.rows.tolist()
    if selection.features is None:
        assert selection.rows is None
        rows = []
    else:
        assert len(selection.features) == len(rows) == len(set(rows))
        assert selection.features.isfinite().all()
    assert {row for row, token in enumerate(order.tolist()) if token < 0} <= set(rows)
    if selection.groups is not None:
        groups = selection.groups
        assert (groups[0].diff() >= 0).all()
        merged = {row for row in rows if order[row] >= 0}
        assert merged <= set(groups[0].tolist()) <= set(rows)
        assert len(set(map(tuple, groups.T.tolist()))) == groups.shape[1]
        for row in groups[0].unique().tolist():  # a merged token is a member of its own row
            members = groups[1][groups[0] == row].tolist()
            assert set(members) <= set(range(num_tokens))
            assert order[row] == -1 or order[row].item() in members


def same(one, other) -> bool:
    pairs = [
        (getattr(one, part), getattr(other, part))
        for part in ("kept", "order", "features", "rows", "groups")
    ]
    return all((a is b is None) or torch.equal(a, b) for a, b in pairs)


# --- All of them -----------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("grid", [(1, 2), (1, 7), (9, 1), (2, 3), (5, 7), (11, 4)], ids=str)
def test_every_count_is_exact(name, fields, grid):
    chooser, tiling = method_class(name)(**fields), Tiling.single(*grid)
    tokens = make(chooser, tiling)
    for keep in range(1, tiling.num_tokens):
        check(chooser.select(tokens, keep), tiling.num_tokens, keep)


@every_method
@pytest.mark.parametrize("newlines", ["drop", "keep"])
def test_every_count_of_a_tiled_image_is_exact(name, fields, newlines):
    chooser = method_class(name)(**fields, newlines=newlines)
    tokens = make(chooser, CANVAS)
    first = CANVAS.num_newlines + 1 if newlines == "keep" else 1
    for keep in {*range(first, first + 9), *range(first, 54, 5), *range(54, CANVAS.num_tokens)}:
        selection = select(chooser, tokens, keep)
        check(selection, CANVAS.num_tokens, keep)
        found = set(CANVAS.newlines(CPU).tolist()) & set(selection.kept.tolist())
        spare = max(0, keep - CANVAS.num_patches)
        assert len(found) == (CANVAS.num_newlines if newlines == "keep" else spare)


@every_method
def test_nothing_given_is_changed_and_ties_are_decided(name, fields):
    """With constant signals too, two calls agree, and each lower index goes first."""
    chooser = method_class(name)(**fields)
    for constant in (False, True):
        tokens = make(chooser, Tiling.single(6, 5))
        if constant:
            for tensor in tokens.signals.values():
                tensor.fill_(0.5)
        before = {signal: tensor.clone() for signal, tensor in tokens.signals.items()}
        versions = [tensor._version for tensor in tokens.signals.values()]
        first = chooser.select(tokens, 11)
        check(first, 30, 11)
        assert versions == [tensor._version for tensor in tokens.signals.values()]
        assert all(torch.equal(tensor, before[s]) for s, tensor in tokens.signals.items())
        assert same(first, chooser.select(tokens, 11))
        if not chooser.needs_budget:
            assert same(chooser.select_adaptive(tokens), chooser.select_adaptive(tokens))
    if name == "prumerge":
        assert first.order.tolist() == [*range(10), -1]
    if name == "prumerge_plus":
        assert first.order.tolist() == [0, 1, *(2 + i * 28 // 8 for i in range(8)), -1]
    if name == "visionzip":
        ranked = first.rows.tolist() if first.rows is not None else []
        dominant = [t for row, t in enumerate(first.order.tolist()) if row not in ranked]
        assert dominant == list(range(len(dominant)))


@every_method
def test_low_precision_chooses_the_same_and_keeps_its_dtype(name, fields):
    chooser = method_class(name)(**fields)
    tokens = make(chooser, Tiling.single(6, 7))
    low = replace(tokens, signals={s: t.bfloat16() for s, t in tokens.signals.items()})
    high = replace(tokens, signals={s: t.float() for s, t in low.signals.items()})
    ours, exact = chooser.select(low, 13), chooser.select(high, 13)
    assert torch.equal(ours.kept, exact.kept)
    if exact.features is not None:
        assert ours.features.dtype == torch.bfloat16
        assert torch.equal(ours.features, exact.features.bfloat16())
        assert ours.groups is exact.groups is None or torch.equal(ours.groups, exact.groups)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("visionzip", "contextual", 1.5),
        ("visionzip", "layer", 1.5),
        ("visionzip", "scores", "clip"),
        ("visionzip", "scope", "tile"),
        ("prumerge", "neighbours", -1),
        ("prumerge", "layer", "last"),
        ("prumerge", "scores", None),
        ("prumerge_plus", "neighbours", 2.0),
        ("pool", "newlines", "compete"),
    ],
)
def test_a_wrong_field_value_is_refused(name, field, value):
    with pytest.raises(MethodFieldError, match=f"{field}="):
        method(name, keep_ratio=0.5, **{field: value})


def test_signals_and_layers():
    tower = Tower(num_layers=32, has_cls=False, merge_unit=4, full_attention=(7, 15, 23, 31))
    windowed = replace(SHAPE, tower=tower)

    def needs(name, shape=SHAPE, **fields):
        return method_class(name)(**fields).needs(shape)

    features = EncoderFeatures()
    assert needs("visionzip") == (ClsAttention(22), Keys(22), features, ClsFeatures())
    received = (ReceivedAttention(31), Keys(31), features)
    assert needs("visionzip", windowed, scores="received") == received
    for name in ("prumerge", "prumerge_plus"):
        assert needs(name) == (ClsAttentionOneHead(23), Keys(23), features)
        assert needs(name, windowed, scores="received") == received
        assert needs(name, layer=-2) == (ClsAttentionOneHead(22), Keys(22), features)
    with pytest.raises(MethodFieldError, match="layer=24"):
        needs("visionzip", layer=24)


# --- Shared operations -----------------------------------------------------------------------


@given(st.integers(0, 12), st.integers(0, 2**31))
def test_complement(count, seed):
    generator = torch.Generator().manual_seed(seed)
    some = torch.randperm(12, generator=generator)[:count]
    assert complement(some, 12).tolist() == sorted(set(range(12)) - set(some.tolist()))


@given(st.integers(0, 9), st.integers(1, 4), st.integers(0, 2**31))
def test_top_set_is_the_stable_top_k(k, distinct, seed):
    scores = torch.randint(distinct, (5, 9), generator=torch.Generator().manual_seed(seed)).float()
    scores[1, 2] = -torch.inf
    assert torch.equal(top_set(scores, k), top_k(scores, k).sort().values)


def test_bags():
    features = torch.tensor([[1.0, 2], [3, 5], [7, 11]])
    members, starts = torch.tensor([0, 2, 1]), torch.tensor([0, 2, 2])
    assert bags(features, members, starts).tolist() == [[4, 6.5], [0, 0], [3, 5]]
    weights = torch.tensor([2, 0.5, -1.0])
    assert bags(features, members, starts, weights).tolist() == [[5.5, 9.5], [0, 0], [-3, -5]]


@pytest.mark.parametrize("rows", range(1, 6))
@pytest.mark.parametrize("columns", [1, 2, 7, 24])
def test_a_lattice_has_room(rows, columns):
    for count in range(1, rows * columns + 1):
        used = lattice_rows(count, rows, columns)
        assert 1 <= used <= min(rows, count)
        assert max(even_shares(count, used)) <= columns
        assert sum(even_shares(count, used)) == count
    assert lattice_rows(rows * columns, rows, columns) == rows


# --- pool ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("grid", "side"), [((24, 24), 2), ((24, 24), 3), ((24, 24), 8), ((12, 30), 6), ((8, 4), 4)]
)
def test_pool_is_average_pooling(grid, side):
    rows, columns = grid
    pool, tiling = method_class("pool")(), Tiling.single(*grid)
    tokens = make(pool, tiling)
    features = tokens.signals[Features()]
    chosen = pool.select(tokens, rows * columns // side**2)
    image = features.T.view(1, -1, rows, columns)
    torch.testing.assert_close(chosen.features, avg_pool2d(image, side)[0].flatten(1).T)
    assert chosen.projected
    assert chosen.order is None
    middle = (side - 1) // 2
    lattice = [
        row * columns + column
        for row in range(middle, rows, side)
        for column in range(middle, columns, side)
    ]
    assert chosen.kept.tolist() == lattice


@pytest.mark.parametrize("grid", [(5, 7), (7, 5), (1, 9), (13, 2)], ids=str)
def test_pool_cells_are_a_partition_into_rectangles(grid):
    columns = grid[1]
    pool, tiling = method_class("pool")(), Tiling.single(*grid)
    tokens = make(pool, tiling)
    features = tokens.signals[Features()]
    for keep in range(1, tiling.num_tokens):
        chosen = pool.select(tokens, keep)
        assert sorted(chosen.groups[1].tolist()) == list(range(tiling.num_tokens))
        assert chosen.groups[0].unique().tolist() == list(range(keep))
        for cell in range(keep):
            members = chosen.groups[1][chosen.groups[0] == cell]
            high, wide = (members // columns).unique(), (members % columns).unique()
            assert len(high) * len(wide) == len(members)
            assert high[-1] - high[0] == len(high) - 1
            assert wide[-1] - wide[0] == len(wide) - 1
            middle = chosen.kept[cell]
            assert middle == high[(len(high) - 1) // 2] * columns + wide[(len(wide) - 1) // 2]
            torch.testing.assert_close(chosen.features[cell], features[members].mean(0))


@given(st.integers(4, 24), st.integers(4, 24), st.floats(0, 1))
def test_pool_cells_are_about_square(rows, columns, part):
    """In the mean; whole numbers make single cells longer."""
    least = math.ceil(max(rows, columns) / min(rows, columns))
    keep = min(rows * columns - 1, max(least, round(part * rows * columns)))
    pool = method_class("pool")()
    groups = pool.select(make(pool, Tiling.single(rows, columns)), keep).groups
    height, width = torch.zeros(2, keep, dtype=torch.int64)
    for cell in range(keep):
        members = groups[1][groups[0] == cell]
        height[cell], width[cell] = (
            (members // columns).unique().numel(),
            (members % columns).unique().numel(),
        )
    assert height.max() - height.min() <= 1
    assert 0.5 <= height.float().mean() / width.float().mean() <= 2


def test_pool_of_tiles_joins_in_raster_order():
    """Tiles of 16 and 4 x 12 patches at a quarter: 2 x 2 everywhere, rows in reading order."""
    tiling = Tiling((Block((4,), (4,)), Block((4, 4), (4, 4), newline="rows")))
    pool = method_class("pool")()
    tokens = make(pool, tiling)
    chosen = select(pool, tokens, 20)
    features = tokens.signals[Features()]
    small, large = features[:16].T.view(1, 5, 4, 4), features[16:].T.view(1, 5, 8, 8)
    pooled = [avg_pool2d(part, 2)[0].flatten(1).T for part in (small, large)]
    assert chosen.order is None
    entering = torch.empty(20, 5)
    entering[chosen.rows] = chosen.features
    torch.testing.assert_close(entering, torch.cat(pooled))
    numbers = tiling.patches(CPU).tolist()
    for row, token in chosen.groups.T.tolist():
        at = numbers.index(token)
        block, width = (0, 4) if at < 16 else (16, 8)
        place = (at - block) // width // 2 * (width // 2) + (at - block) % width // 2
        assert row == place + (0 if at < 16 else 4)


# --- visionzip -------------------------------------------------------------------------------


def visionzip_rows(scores, keys, features, cls, keep, contextual):
    """The published steps for one tile, token by token: (order, features), patches from 0."""
    merged = min(round(keep * contextual), keep - 1)
    with_cls = cls is not None and keep > 1
    dominant = sorted(
        sorted(range(len(scores)), key=lambda i: -scores[i])[: keep - merged - with_cls]
    )
    rest = [i for i in range(len(scores)) if i not in dominant]
    order = [-1] * with_cls + dominant
    rows = [cls] * with_cls + [features[i] for i in dominant]
    targets = rest[:: max(1, len(rest) // merged)][:merged] if merged else []
    metric = keys.mean(1)
    assigned: dict[int, list[int]] = {target: [] for target in targets}
    for token in set(rest) - set(targets) if targets else ():
        similar = [float(cosine_similarity(metric[token], metric[t], dim=0)) for t in targets]
        assigned[targets[similar.index(max(similar))]].append(token)
    for target, others in assigned.items():
        mean = features[others].mean(0) if others else 0
        rows.append(features[target] + mean)
    return order + targets, torch.stack(rows), assigned


@pytest.mark.parametrize("scores", ["cls", "received"])
@pytest.mark.parametrize(("keep", "contextual"), [(1, 0.5), (2, 0.5), (9, 0.4), (33, 0.3), (34, 0)])
def test_visionzip_is_the_published_one(scores, keep, contextual):
    chooser = method_class("visionzip")(scores=scores, contextual=contextual)
    tokens = make(chooser, Tiling.single(5, 7))
    signals = list(tokens.signals.values())
    cls = signals[3][0] if scores == "cls" else None
    order, rows, assigned = visionzip_rows(*signals[:3], cls, keep, contextual)
    chosen = chooser.select(tokens, keep)
    assert chosen.order.tolist() == order
    entering = signals[2][chosen.order].clone()
    if chosen.features is not None:
        entering[chosen.rows] = chosen.features
    torch.testing.assert_close(entering, rows)
    first = keep - len(assigned)
    groups = [
        [first + i, token]
        for i, (target, others) in enumerate(assigned.items())
        for token in sorted([target, *others])
    ]
    assert ([] if chosen.groups is None else chosen.groups.T.tolist()) == groups


def test_visionzip_by_hand():
    """Six tokens in a row, four rows: CLS, token 4, and tokens 0 and 2 with what is like them."""
    chooser = method_class("visionzip")(contextual=0.5)
    attention = torch.tensor([0.1, 0.05, 0.02, 0.03, 0.3, 0.04])
    east, north = [1.0, 0.0], [0.0, 1.0]
    keys = torch.tensor([east, north, north, north, east, east])[:, None]
    features = torch.tensor([1.0, 10, 100, 1000, 10000, 100000])[:, None]
    cls = torch.tensor([[7.0]])
    tokens = given_signals(chooser, Tiling.single(1, 6), attention, keys, features, cls)
    chosen = chooser.select(tokens, 4)
    # the rest is 0, 1, 2, 3, 5: a step of 2 makes 0 and 2 targets; 5 is like 0, 1 and 3 like 2
    assert chosen.order.tolist() == [-1, 4, 0, 2]
    assert chosen.kept.tolist() == [0, 2, 4]
    assert chosen.rows.tolist() == [0, 2, 3]
    assert chosen.features.tolist() == [[7], [100001], [605]]
    assert chosen.groups.tolist() == [[2, 2, 3, 3, 3], [0, 5, 1, 2, 3]]
    assert not chosen.projected


@pytest.mark.parametrize(
    ("keep", "dominant", "contextual"), [(64, 54, 10), (128, 108, 20), (192, 162, 30), (32, 27, 5)]
)
def test_visionzip_splits_budgets_as_published(keep, dominant, contextual):
    chooser = method_class("visionzip")()
    chosen = chooser.select(make(chooser, Tiling.single(24, 24)), keep)
    assert len(chosen.groups[0].unique()) == contextual
    assert len(chosen.features) == contextual + 1  # and CLS, which counts as dominant
    assert keep - contextual == dominant


@pytest.mark.parametrize("keep", [20, 30, 45])
def test_visionzip_order_of_tiles(keep):
    """Thumbnail: CLS, dominant, merged. Canvas: dominant in raster order, all CLS, all merged."""
    tiling = CANVAS.without_newlines()
    chooser = method_class("visionzip")(contextual=0.3)
    tokens = make(chooser, tiling)
    scores, keys, features, cls = tokens.signals.values()
    counts = share(keep, [tile.num_patches for tile in tiling.tiles])
    parts: list[list[list]] = [[], [], []]  # CLS, dominant, merged: per tile (number, feature)
    for number, places in enumerate(tiling.tile_patches(CPU)):
        order, rows, assigned = visionzip_rows(
            scores[places], keys[places], features[places], cls[number], counts[number], 0.3
        )
        names = [places[i].item() if i >= 0 else -1 for i in order]
        listed = list(zip(names, rows.tolist(), strict=True))
        cut = len(listed) - len(assigned)
        for part, found in zip(parts, (listed[:1], listed[1:cut], listed[cut:]), strict=True):
            part.append(found)
    expected = [*parts[0][0], *parts[1][0], *parts[2][0]]
    crops = [list(chain.from_iterable(part[1:])) for part in parts]
    expected += [*sorted(crops[1]), *crops[0], *crops[2]]
    chosen = chooser.select(tokens, keep)
    assert chosen.order.tolist() == [name for name, _ in expected]
    entering = features[chosen.order].clone()
    entering[chosen.rows] = chosen.features
    torch.testing.assert_close(entering, torch.tensor([row for _, row in expected]))


def test_visionzip_keeps_small_tiles_whole():
    """Where a tile's share is its size nothing of it is merged, and no CLS is added."""
    chooser = method_class("visionzip")(contextual=0.5)
    tiling = CANVAS.without_newlines()
    chosen = chooser.select(make(chooser, tiling), tiling.num_tokens - 1)
    whole = [number for number, tile in enumerate(tiling.tiles) if tile.num_patches < 16]
    for number in whole:
        tile = tiling.tile_patches(CPU)[number].tolist()
        assert set(tile) <= set(chosen.kept.tolist())
        assert not set(tile) & set(chosen.groups[1].tolist())


# --- prumerge and prumerge_plus --------------------------------------------------------------


def prumerge_rows(weights, keys, features, centres, neighbours, aggregate):
    """The published merge, token by token."""
    rows, members, flat = [], [], keys.flatten(1)
    for centre in centres:
        others = [i for i in range(len(weights)) if i != centre]
        similar = {i: float(cosine_similarity(flat[i], flat[centre], dim=0)) for i in others}
        nearest = sorted(others, key=lambda i: -similar[i])[:neighbours]
        rows.append(features[centre] + sum(weights[i] * features[i] for i in nearest))
        members.append({centre, *nearest})
    if aggregate:
        rest = [i for i in range(len(weights)) if i not in centres]
        rows.append(sum(weights[i] * features[i] for i in rest))
        members.append(set(rest))
    return torch.stack(rows), members


def check_prumerge(chooser, tokens, chosen, centres, aggregate=True):
    weights, keys, features = tokens.signals.values()
    if chooser.scores == "received":
        weights = weights / weights.sum()
    rows, members = prumerge_rows(weights, keys, features, centres, chooser.neighbours, aggregate)
    assert chosen.order.tolist() == centres + [-1] * aggregate
    torch.testing.assert_close(chosen.features, rows)
    found = [set(chosen.groups[1][chosen.groups[0] == row].tolist()) for row in range(len(rows))]
    assert found == members
    assert chosen.rows is None
    assert not chosen.projected


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("scores", ["cls", "received"])
@pytest.mark.parametrize("grid", [(4, 5), (6, 8)], ids=str)  # fewer and more than 33 tokens
@pytest.mark.parametrize("keep", [1, 2, 3, 9, 19])
def test_prumerge_of_a_budget(name, scores, grid, keep):
    chooser = method_class(name)(scores=scores)
    tokens = make(chooser, Tiling.single(*grid))
    centres = top_k(next(iter(tokens.signals.values())), max(1, keep - 1)).tolist()
    if name == "prumerge_plus":
        attended = max(1, round(len(centres) / 4))
        rest = sorted(set(range(tokens.num_tokens)) - set(centres[:attended]))
        spaced = len(centres) - attended
        centres = centres[:attended] + [rest[i * len(rest) // spaced] for i in range(spaced)]
    check_prumerge(chooser, tokens, chooser.select(tokens, keep), centres, aggregate=keep > 1)


def test_prumerge_by_hand():
    """Five tokens, three rows of one neighbour each: 3 with 1, 0 with 2, and the rest."""
    chooser = method_class("prumerge")(neighbours=1)
    attention = torch.tensor([0.25, 0.0625, 0.125, 0.5, 0.03125])
    keys = torch.tensor([[1.0, 0], [0, 1], [2, 0.5], [0.1, 3], [-1, -1]])[:, None]
    features = torch.tensor([1.0, 16, 64, 8, 32])[:, None]
    tokens = given_signals(chooser, Tiling.single(1, 5), attention, keys, features)
    chosen = chooser.select(tokens, 3)
    assert chosen.order.tolist() == [3, 0, -1]
    assert chosen.kept.tolist() == [0, 3]
    assert chosen.features.tolist() == [[8 + 1], [1 + 8], [1 + 8 + 1]]
    assert chosen.groups.tolist() == [[0, 0, 1, 1, 2, 2, 2], [3, 1, 0, 2, 1, 2, 4]]


def outliers(weights: torch.Tensor) -> int:
    low, high = np.percentile(weights.numpy(), [25, 75])
    return int((weights.numpy() > high + 1.5 * (high - low)).sum())


@pytest.mark.parametrize("seed", range(5))
def test_prumerge_finds_its_own_number(seed):
    chooser = method_class("prumerge")(neighbours=4)
    tokens = make(chooser, Tiling.single(8, 9), seed=seed)
    weights = next(iter(tokens.signals.values()))
    count = outliers(weights)
    assert count > 2
    chosen = chooser.select_adaptive(tokens)
    check_prumerge(chooser, tokens, chosen, top_k(weights, count).tolist())
    assert same(chosen, chooser.select(tokens, count + 1))


@pytest.mark.parametrize(("highest", "count"), [([3.45, 3.6], 1), ([3.6, 3.7], 2), ([3, 3.4], 1)])
def test_prumerge_outliers_by_hand(highest, count):
    """Quartiles 1 and 2: what lies above 3.5 stands out; one token is kept where nothing does."""
    chooser = method_class("prumerge")(neighbours=0)
    tokens = make(chooser, Tiling.single(3, 3))
    next(iter(tokens.signals.values())).copy_(torch.tensor([*highest, 0, 1, 1, 1.5, 1.5, 2, 2]))
    assert chooser.select_adaptive(tokens).order.tolist() == [*[1, 0][:count], -1]


@pytest.mark.parametrize("high", [1, 3, 6, 7, 12, 17])
def test_prumerge_plus_finds_its_own_number(high):
    """`high` of 72 tokens stand out: every (72 // high // 3)-th token is added, but the last."""
    chooser = method_class("prumerge_plus")(neighbours=4)
    tokens = make(chooser, Tiling.single(8, 9), seed=high)
    weights = next(iter(tokens.signals.values()))
    weights.copy_(torch.linspace(0.01, 0.011, 72))
    tall = torch.randperm(71, generator=torch.Generator().manual_seed(high))[:high]
    weights[tall] = torch.linspace(0.5, 0.9, high)
    assert outliers(weights) == high
    step = max(1, 72 // high // 3)
    attended = tall.flip(0).tolist()
    centres = attended + [i for i in range(0, 71, step) if i not in attended]
    check_prumerge(chooser, tokens, chooser.select_adaptive(tokens), centres)


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
def test_prumerge_where_nothing_stands_out(name):
    """The published code keeps no token, or crashes; here the most attended one stays."""
    chooser = method_class(name)()
    tokens = make(chooser, Tiling.single(3, 4))
    weights = next(iter(tokens.signals.values()))
    weights.fill_(0.1)
    spaced = [] if name == "prumerge" else [4, 8]
    assert chooser.select_adaptive(tokens).order.tolist() == [0, *spaced, -1]
    alone = chooser.select_adaptive(make(chooser, Tiling.single(1, 1)))
    check(alone, 1, 1)


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 2**31))
def test_prumerge_never_finds_more_than_it_declares(name, num_tokens, high, seed):
    chooser = method_class(name)(neighbours=2)
    tokens = make(chooser, Tiling.single(1, num_tokens), seed=seed)
    weights = next(iter(tokens.signals.values()))
    weights[:] = 0.01
    weights[: min(high, num_tokens)] = 0.9
    weights += torch.rand(num_tokens, generator=torch.Generator().manual_seed(seed)) * 1e-4
    selection = chooser.select_adaptive(tokens)
    check(selection, num_tokens, selection.count)
    assert selection.count <= chooser.most(num_tokens) <= num_tokens
    if name == "prumerge" and high == num_tokens // 4:
        assert selection.count == chooser.most(num_tokens)  # the bound is reached


@pytest.mark.parametrize("name", ["prumerge", "prumerge_plus"])
@pytest.mark.parametrize("newlines", ["drop", "keep"])
def test_prumerge_of_tiles_without_a_budget(name, newlines):
    chooser = method_class(name)(newlines=newlines)
    selection = select(chooser, make(chooser, CANVAS), None)
    check(selection, CANVAS.num_tokens, selection.count)
    assert selection.count <= most(chooser, CANVAS)
    assert (selection.order == -1).sum() == len(CANVAS.tiles)


def test_prumerge_needs_no_budget():
    for name in ("prumerge", "prumerge_plus"):
        assert method(name).adaptive
        assert not method(name, keep_ratio=0.5).adaptive
