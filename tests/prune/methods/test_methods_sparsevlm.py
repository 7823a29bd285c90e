"""SparseVLM and SparseVLM+: raters, scores, clusters and merged rows by hand; published counts."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.budget import plan, tokens_per_layer
from vlmprune.prune.contract import (
    Decoder,
    Hidden,
    ModelShape,
    Place,
    RotaryAffinity,
    TextAttention,
    Tower,
    VisualTokens,
)
from vlmprune.prune.errors import MethodFieldError, UnsupportedModelError
from vlmprune.prune.methods.decoder import sparsevlm
from vlmprune.prune.methods.decoder.sparsevlm import raters
from vlmprune.prune.ops.clusters import density_clusters, merged_clusters
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Block, Tiling

V1, V2 = "sparsevlm", "sparsevlm_plus"
TILED = Tiling((Block((3,), (3,)), Block((2, 3), (3, 2), "rows")))  # 9 + 25 patches, 5 newlines
both = pytest.mark.parametrize("name", [V1, V2])
PUBLISHED = {
    V1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    V2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Tokens kept at each cut, of 576; SparseVLM adds merged rows."""


def model(depth: int = 32) -> ModelShape:
    decoder = Decoder(num_layers=depth, hidden_size=4096, intermediate_size=11008)
    return ModelShape(tower=Tower(num_layers=24, has_cls=True), decoder=decoder)


def merged_of(removed: int) -> int:
    """Rows into which so many removed tokens are merged, as the official code counts."""
    return int((int(0.3 * removed) + 1) / 10) + 1


def at_cut(signals, *, layer=3, alive=None, tiling=None) -> VisualTokens:
    num_tokens = len(next(iter(signals.values())))
    return VisualTokens(
        num_tokens=num_tokens,
        tiling=tiling or Tiling.single(1, num_tokens),
        shape=model(),
        signals=signals,
        alive=torch.arange(num_tokens) if alive is None else alive,
        place=Place.DECODER if layer else Place.BEFORE_LLM,
        layer=layer,
    )


def some(name: str, num_tokens: int, *, layer=3, seed=0, constant=False, heads=4, width=6):
    """Random signals of the cut at `layer`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        Hidden: (num_tokens, width),
        RotaryAffinity: (num_tokens, 3),
        TextAttention: (num_tokens, heads, 3) if name == V2 else (num_tokens,),
    }
    signals = {}
    for signal in method_class(name)().reads(layer):
        drawn = torch.rand(shapes[type(signal)], generator=generator) + 0.1
        signals[signal] = torch.ones_like(drawn) if constant else drawn
    return signals


# --- Raters --------------------------------------------------------------------------------------


def test_raters_look_more_than_the_mean():
    """Products 0, ln 3, 0 and their softmax 1/5, 3/5, 1/5; with the second token 1/3 each."""
    text = torch.tensor([[0.0, 1.0], [math.log(3), 0.0], [0.0, 2.0]])
    assert raters(torch.tensor([[1.0, 0.0]]), text).tolist() == [False, True, False]
    assert raters(torch.tensor([[1.0, 0.0], [0.0, 0.0]]), text).tolist() == [False, True, False]
    # e^8, 1, e^16 of the third: it takes that token's look, the second the other's
    visual = torch.tensor([[4.0, 0.0], [0.0, 8.0]])
    assert raters(visual, text).tolist() == [False, True, True]


def test_the_softmax_is_over_text_and_has_no_scale():
    """Products 6, -2, -2 and 0, 0, 0: softmax .998 .002 and twice .119 .881, means .41 .59. With a
    scale of a tenth, that of this width: .65 .35 and twice .45 .55, means .515 .485."""
    visual, text = torch.zeros(3, 100), torch.zeros(2, 100)
    visual[:, 0], text[0, 0] = torch.tensor([6.0, -2.0, -2.0]), 1
    assert raters(visual, text).tolist() == [False, True]
    assert raters(visual / 10, text).tolist() == [True, False]


@pytest.mark.parametrize("text", [torch.randn(1, 4), torch.ones(5, 4), torch.zeros(2, 4)])
def test_if_none_looks_more_all_are_raters(text):
    visual = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    assert raters(visual, text).tolist() == [True] * len(text)


def test_raters_in_parts(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    visual, text = (torch.randn(n, 8, generator=generator).half() for n in (50, 11))
    exact = (visual.double() @ text.double().T).softmax(1).mean(0)
    for at_once in (2**22, 77, 11, 1):
        monkeypatch.setattr(sparsevlm, "_AT_ONCE", at_once)
        assert torch.equal(raters(visual, text), exact > exact.mean())


# --- Clusters ------------------------------------------------------------------------------------


def line(*places: float, width: int = 1) -> torch.Tensor:
    return torch.tensor(places)[:, None].repeat(1, width)


@pytest.mark.parametrize("width", [1, 4])
def test_density_peaks_by_hand(width):
    """Five points have a neighbour at 1, and equal densities: the lower index is denser. Reaches
    are then 30 (the largest distance), 1, 1, 8, 1 and 19, the last one's density next to nothing.
    """
    clusters = density_clusters(line(0, 1, 2, 10, 11, 30, width=width), 2)
    assert clusters.tolist() == [0, 0, 0, 1, 1, 1]


def test_a_lonely_point_is_no_centre():
    """Its reach of 47 is nothing beside a density of exp(-47^2 / 2)."""
    assert density_clusters(line(50, 0, 1, 2, 3), 2).tolist() == [1, 0, 1, 1, 1]


def test_the_foremost_centre_is_the_first_row():
    """Three nearest: mean squares 5/3, 2/3, 5/3 and .02/3 x (5, 2, 5): the small group leads."""
    points = line(0, 1, 2, 9, 9.1, 9.2)
    assert density_clusters(points, 3).tolist()[4] == 0
    rows, pairs = merged_clusters(points, 2)
    torch.testing.assert_close(rows, line(9.1, 1.0), rtol=1e-5, atol=0)
    assert pairs.tolist() == [[0, 0, 0, 1, 1, 1], [3, 4, 5, 0, 1, 2]]


def test_equal_points_are_told_apart_by_index():
    for count in (1, 2, 7):
        owner = density_clusters(torch.full((7, 3), 2.5), count)
        assert owner.tolist() == [*range(count), *[0] * (7 - count)]


def test_far_apart_points_have_densities_too():
    """All densities of these are 0 in float32, where the official noise chooses. The last two are
    the densest, by far: their distance to others counts for little."""
    points = 1000 * line(0, 2, 5, 10, 11, 30)
    assert density_clusters(points, 2).tolist() == [0, 0, 0, 0, 1, 1]


def reference(points: torch.Tensor, count: int) -> list[int]:
    """The specification's steps one by one, in double precision, densities by their logarithm."""
    rows, width = points.double().tolist(), points.shape[1]
    number = range(len(rows))
    apart = [[math.dist(one, two) / math.sqrt(width) for two in rows] for one in rows]
    density = [-sum(sorted(d * d for d in apart[i])[:count]) / count for i in number]
    score = []
    for i in number:
        denser = [apart[i][j] for j in number if (density[j], -j) > (density[i], -i)]
        reach = min(denser) if denser else max(map(max, apart))
        score.append(density[i] + (math.log(reach) if reach else -math.inf))
    centres = sorted(number, key=lambda i: -score[i])[:count]
    owner = [min(range(count), key=lambda c: apart[i][centres[c]]) for i in number]
    for cluster, centre in enumerate(centres):
        owner[centre] = cluster
    return owner


@pytest.mark.parametrize("seed", range(30))
def test_clusters_as_specified(seed):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 60, (), generator=generator))
    points = torch.randn(size, 1 + seed % 9, generator=generator) * (1 + seed % 4)
    for count in {1, min(2, size), 1 + size // 10, size}:
        assert density_clusters(points, count).tolist() == reference(points, count)


def test_what_all_points_share_does_not_matter():
    """As a few dimensions of hidden states, which are large in every token."""
    points = torch.randn(40, 8, generator=torch.Generator().manual_seed(1)).mul(64).round().div(64)
    shared = torch.zeros(8).index_fill(0, torch.tensor([3]), 2**14)
    assert torch.equal(density_clusters(points + shared, 5), density_clusters(points, 5))


@given(size=st.integers(1, 40), data=st.data(), copies=st.booleans())
@settings(deadline=None)
def test_no_cluster_is_empty(size, data, copies):
    count = data.draw(st.integers(1, size))
    points = torch.randn(size, 3, generator=torch.Generator().manual_seed(size))
    points = points[: size // 2 + 1].repeat(2, 1)[:size] if copies else points
    rows, (row, member) = merged_clusters(points, count)
    assert member.sort().values.tolist() == list(range(size))
    assert row.tolist() == sorted(row.tolist()) and set(row.tolist()) == set(range(count))
    for number in range(count):
        mine = points[member[row == number]].double()
        mean = mine.sum(0) / (len(mine) + 1e-6)
        torch.testing.assert_close(rows[number].double(), mean, rtol=1e-5, atol=1e-6)


def test_rows_are_summed_in_float32_and_cast_back():
    points = (torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) + 10).bfloat16()
    rows, _ = merged_clusters(points, 1)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows[0], (points.float().sum(0) / (64 + 1e-6)).bfloat16())


# --- SparseVLM -----------------------------------------------------------------------------------


def sparse_signals(scores, hidden, layer=3):
    return {TextAttention(layer - 1, rows=raters): scores, Hidden(layer): hidden}


def test_a_cut_by_hand():
    """Of 10 tokens 6 rows: 5 kept, and of the 5 others the best two (int(1.5) + 1) merged to 1."""
    scores = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.5, 0.0])
    hidden = torch.arange(20.0).view(10, 2) + 1
    tokens = at_cut(sparse_signals(scores, hidden))
    chosen = method_class(V1)().select(tokens, 6)
    assert chosen.kept.tolist() == [1, 3, 5, 7, 8]
    assert chosen.order.tolist() == [1, 3, 5, 7, 8, -1]
    assert chosen.rows.tolist() == [5] and chosen.projected
    assert chosen.groups.tolist() == [[5, 5], [6, 4]]  # by score
    torch.testing.assert_close(chosen.features, (hidden[4] + hidden[6])[None] / (2 + 1e-6))


def test_a_single_row_is_the_best_token():
    signals = some(V1, 20)
    chosen = method_class(V1)().select(at_cut(signals), 1)
    assert chosen.kept.tolist() == [int(signals[TextAttention(2, rows=raters)].argmax())]
    assert chosen.order is None and chosen.features is None and chosen.groups is None


@given(num_tokens=st.integers(2, 400), seed=st.integers(0, 9), data=st.data())
@settings(deadline=None, max_examples=60)
def test_rows_and_members(num_tokens, seed, data):
    """Exactly as many rows as asked; of what goes, the best three tenths are merged, each once."""
    keep = data.draw(st.integers(1, num_tokens - 1))
    signals = some(V1, num_tokens, seed=seed)
    scores, hidden = signals.values()
    chosen = select(method_class(V1)(), at_cut(signals), keep)
    assert chosen.count == keep
    best, merged = len(chosen.kept), keep - len(chosen.kept)
    ranked = scores.argsort(descending=True, stable=True)
    assert chosen.kept.tolist() == ranked[:best].sort().values.tolist()
    if not merged:
        assert keep == 1
        return
    assert chosen.order.tolist() == [*chosen.kept.tolist(), *[-1] * merged]
    assert chosen.rows.tolist() == list(range(best, keep))
    row, member = chosen.groups
    recycled = ranked[best : best + int(0.3 * (num_tokens - best)) + 1]
    assert member.sort().values.tolist() == recycled.sort().values.tolist()
    assert set(row.tolist()) == set(range(best, keep)) and row.tolist() == sorted(row.tolist())
    for number, feature in zip(range(best, keep), chosen.features, strict=True):
        mine = hidden[member[row == number]]
        torch.testing.assert_close(feature, mine.sum(0) / (len(mine) + 1e-6))


@pytest.mark.parametrize("num_tokens", [*range(2, 61), 117, 204, 309, 576, 577, 2880])
def test_every_count_is_met(num_tokens):
    """Kept and merged make the count as officially wherever that is possible, else one is kept."""
    possible = {}
    for kept in range(1, num_tokens):
        possible[kept + merged_of(num_tokens - kept)] = kept  # the largest of two
    for keep in range(1, num_tokens):
        assert sparsevlm._kept_of(num_tokens, keep) == possible.get(keep, 1)
    least = min(possible)
    assert sorted(possible) == list(range(least, num_tokens + 1))


@both
@pytest.mark.parametrize("keep", range(1, TILED.num_tokens))
def test_every_count_of_a_tiled_image(name, keep):
    tokens = at_cut(some(name, TILED.num_tokens), tiling=TILED)
    assert select(method_class(name)(), tokens, keep).count == keep
    alive = torch.where(torch.arange(TILED.num_tokens) < 30, torch.arange(TILED.num_tokens), -1)
    tokens = at_cut(some(name, TILED.num_tokens, layer=7), layer=7, alive=alive, tiling=TILED)
    assert select(method_class(name)(), tokens, keep).count == keep


def test_a_cut_reads_its_own_layer():
    signals = some(V1, 30, layer=3) | some(V1, 30, layer=7, seed=1)
    for layer in (3, 7):
        alone = {s: v for s, v in signals.items() if s in method_class(V1)().reads(layer)}
        one, two = (
            method_class(V1)().select(at_cut(given, layer=layer), 9) for given in (signals, alone)
        )
        assert torch.equal(one.kept, two.kept) and torch.equal(one.features, two.features)


def test_merged_rows_have_the_dtype_of_the_model():
    signals = some(V1, 40)
    signals[Hidden(3)] = signals[Hidden(3)].bfloat16()
    assert method_class(V1)().select(at_cut(signals), 20).features.dtype == torch.bfloat16


# --- SparseVLM+ ----------------------------------------------------------------------------------


def plus_signals(attention, affinity=None):
    attention = torch.as_tensor(attention, dtype=torch.float32)
    if affinity is None:
        affinity = torch.ones(len(attention), attention.shape[2])
    return {
        TextAttention(2, rows=raters, each=True): attention,
        RotaryAffinity(2, rows=raters): torch.as_tensor(affinity, dtype=torch.float32),
    }


def test_only_heads_that_look_at_the_image_are_heard():
    """Heads with sums 8, 6 and 4: the first speaks for tokens 0 and 1, the second for 2 and 3."""
    attention = torch.tensor([[4, 0, 0], [4, 0, 1], [0, 3.5, 1], [0, 2.5, 2.0]])[:, :, None]
    for heads, kept in ((1, [0, 1]), (2, [0, 1]), (3, [1, 2])):
        chosen = method_class(V2)(heads=heads)
        assert chosen.select(at_cut(plus_signals(attention)), 2).kept.tolist() == kept
    first = method_class(V2)(heads=1).select(at_cut(plus_signals(attention[:, 1:])), 2)
    assert first.kept.tolist() == [2, 3]


def test_a_head_counts_by_its_sum_not_by_its_largest():
    attention = torch.tensor([[9, 0], [0, 6], [0, 5], [0.0, 4]])[:, :, None]
    chosen = method_class(V2)(heads=1)
    assert chosen.select(at_cut(plus_signals(attention)), 1).kept.tolist() == [1]


def test_the_only_head_is_heard():
    attention = torch.tensor([1.0, 3, 2])[:, None, None]
    assert method_class(V2)().select(at_cut(plus_signals(attention)), 1).kept.tolist() == [1]


def test_distance_is_divided_out_before_heads_are_ranked():
    """Divided, the heads have 1 + 4 and 2 + 2; as they are 4 + 2 and 8 + 1. A factor below zero
    turns the sign: of token 1 with -2, and with it the second head is ahead."""
    attention = torch.tensor([[4.0, 8.0], [2.0, 1.0]])[:, :, None]
    chosen = method_class(V2)(heads=1)
    near = plus_signals(attention, [[4.0], [0.5]])
    assert chosen.select(at_cut(near), 1).kept.tolist() == [1]
    turned = plus_signals(attention, [[4.0], [-2.0]])
    assert chosen.select(at_cut(turned), 1).kept.tolist() == [0]


def test_raters_count_alike():
    """Means over two rows 2, 2.5, 1; the factors are each row's own."""
    attention = torch.tensor([[[4.0, 0.0]], [[0.0, 5.0]], [[1.0, 1.0]]])
    one_head = method_class(V2)(heads=1)
    assert one_head.select(at_cut(plus_signals(attention)), 1).kept.tolist() == [1]
    affinity = [[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]
    assert one_head.select(at_cut(plus_signals(attention, affinity)), 1).kept.tolist() == [0]


def test_tokens_only():
    chosen = method_class(V2)().select(at_cut(some(V2, 50)), 20)
    assert chosen.count == len(chosen.kept) == 20
    assert chosen.order is None and chosen.features is None and chosen.groups is None


@pytest.mark.parametrize(
    ("of", "heard"), [(32, 14), (40, 18), (28, 12), (16, 7), (8, 4), (2, 1), (1, 1)]
)
def test_the_share_of_heads(of, heard):
    """Head h looks h more at the image, and at token h alone: those heard are the last ones."""
    attention = torch.ones(of + 1, of, 1)
    attention[range(of), range(of), 0] += torch.arange(of) + 1
    kept = method_class(V2)().select(at_cut(plus_signals(attention)), heard).kept
    assert kept.tolist() == list(range(of - heard, of))
    given = method_class(V2)(heads=heard).select(at_cut(plus_signals(attention)), heard).kept
    assert given.tolist() == kept.tolist()
    one_more = method_class(V2)().select(at_cut(plus_signals(attention)), min(of, heard + 1)).kept
    if heard < of:  # a head that is not heard has no favourite: the first of equal tokens
        assert 0 in one_more.tolist()


def test_more_heads_than_there_are():
    with pytest.raises(MethodFieldError, match=r"heads=5 .* has 4: give 1\.\.4"):
        method_class(V2)(heads=5).select(at_cut(some(V2, 9, heads=4)), 3)


# --- Purity --------------------------------------------------------------------------------------


@both
def test_nothing_given_is_changed(name):
    signals = some(name, 60)
    before = {signal: value.clone() for signal, value in signals.items()}
    for keep in (1, 2, 9, 30, 59):
        method_class(name)().select(at_cut(signals), keep)
    assert all(torch.equal(signals[signal], before[signal]) for signal in signals)
    text = torch.randn(5, 6)
    copy = text.clone()
    raters(next(reversed(before.values())).flatten()[:54].view(-1, 6), text)
    assert torch.equal(text, copy)


@both
@pytest.mark.parametrize("constant", [False, True])
def test_the_same_again(name, constant):
    for keep in (1, 5, 30, 59):
        one, two = (
            method_class(name)().select(at_cut(some(name, 60, constant=constant)), keep)
            for _ in range(2)
        )
        for left, right in ((one.kept, two.kept), (one.groups, two.groups)):
            assert (left is None and right is None) or torch.equal(left, right)
        if constant:  # ties go to the lower index
            assert one.kept.tolist() == list(range(len(one.kept)))
        if one.features is not None:
            assert torch.equal(one.features, two.features)


@both
def test_the_host_never_waits(name):
    """A tensor without values cannot be read: nothing of it may decide what the host does."""
    with FakeTensorMode():
        signals = {s: torch.empty_like(v) for s, v in some(name, 60).items()}
        assert method_class(name)().select(at_cut(signals), 20).count == 20
        assert raters(torch.empty(9, 4), torch.empty(5, 4)).shape == (5,)


# --- What is declared ----------------------------------------------------------------------------


def test_signals():
    layers = (3, 7, 16)
    assert method_class(V1)().needs(model()) == tuple(
        s for k in layers for s in (TextAttention(k - 1, rows=raters), Hidden(k))
    )
    assert method_class(V2)().needs(model()) == tuple(
        s
        for k in layers
        for s in (
            TextAttention(k - 1, rows=raters, each=True),
            RotaryAffinity(k - 1, rows=raters),
        )
    )


@both
def test_facts(name):
    cls = method_class(name)
    assert cls.positions == {V1: "repacked", V2: "original"}[name]
    assert not cls.needs_budget and not cls.finds_count
    assert cls() == cls() and hash(cls()) == hash(cls()) and cls() != cls(retain=64)


@both
@pytest.mark.parametrize(
    ("depth", "layers"), [(32, [3, 7, 16]), (40, [4, 9, 20]), (28, [3, 6, 14]), (4, [1, 2, 3])]
)
def test_layers_of_other_depths(name, depth, layers):
    assert [cut.layer for cut in method_class(name)().cuts(model(depth))] == layers


@both
def test_a_decoder_without_room_is_refused(name):
    with pytest.raises(UnsupportedModelError, match="3 cuts"):
        method_class(name)().cuts(model(3))


@both
@pytest.mark.parametrize("retain", [193, 0, -64, 192.0, True, "192", None, [64]])
def test_only_published_averages(name, retain):
    with pytest.raises(MethodFieldError, match=r"retain=.*192 or 128 or 96 or 64"):
        method_class(name)(retain=retain)


@pytest.mark.parametrize("heads", [0, -1, 2.0, True, "14"])
def test_impossible_heads(heads):
    with pytest.raises(MethodFieldError, match="heads="):
        method_class(V2)(heads=heads)


# --- Counts --------------------------------------------------------------------------------------


def stages(call, num_tokens: int = 576, depth: int = 32) -> list[tuple[int, int]]:
    return [(stage.layer, stage.keep) for stage in plan(num_tokens, [call], model(depth))]


def average(call, num_tokens: int = 576, *, shift: int = 0) -> float:
    """Mean tokens entering the layers, or (1) those left behind each."""
    found = tokens_per_layer(num_tokens, plan(num_tokens, [call], model()), 32)
    return sum(found[shift:] + found[-1:] * shift) / 32


@both
@pytest.mark.parametrize("retain", [192, 128, 96, 64])
def test_published_schedules(name, retain):
    """The counts lead to the published numbers of kept tokens, stage by stage."""
    found = [keep for _, keep in stages(method(name, retain=retain))]
    if name == V1:
        kept = [sparsevlm._kept_of(n, k) for n, k in zip((576, *found), found, strict=False)]
        assert found == [
            k + merged_of(n - k) for n, k in zip((576, *found), PUBLISHED[V1][retain], strict=False)
        ]
    else:
        kept = found
    assert kept == list(PUBLISHED[name][retain])


@pytest.mark.parametrize(
    ("retain", "behind", "entering"),
    [(192, 192.0, 206.5), (128, 128.6, 145.4), (96, 96.9, None), (64, 64.8, 82.3)],
)
def test_published_averages(retain, behind, entering):
    call = method(V1, retain=retain)
    assert round(average(call, shift=1), 1) == behind
    assert entering is None or average(call) == pytest.approx(entering, abs=0.0501)


@both
@pytest.mark.parametrize("num_tokens", [2880, 1152, 577, 575, 100])
def test_other_images_keep_the_shares(name, num_tokens):
    """The last count is rounded; those before are as far off as its rounding, times their share."""
    for retain in (192, 128, 96, 64):
        published = method_class(name).schedules[retain]
        found = [keep for _, keep in stages(method(name, retain=retain), num_tokens)]
        for keep, count in zip(found, published, strict=True):
            exact = count * num_tokens / 576
            assert abs(keep - exact) <= 0.5 * count / published[-1] + 0.5


@both
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5, 17])
def test_small_images(name, num_tokens):
    for retain in (192, 64):
        found = [keep for _, keep in stages(method(name, retain=retain), num_tokens)]
        assert all(1 <= keep < num_tokens for keep in found)
        assert found == sorted(set(found), reverse=True)


def test_a_budget_scales_the_schedule():
    assert stages(method(V1, keep_tokens=113)) == [(3, 309), (7, 204), (16, 113)]
    assert stages(method(V1, retain=64, keep_tokens=36)) == [(3, 164), (7, 64), (16, 36)]
    assert stages(method(V2, retain=64, keep_tokens=2)) == [(3, 7), (7, 3), (16, 2)]
    assert stages(method(V1, keep_tokens=300)) == [(7, 542), (16, 300)]  # 820 are more than all
    assert stages(method(V1, keep_tokens=576)) == []


@both
def test_an_average_is_met(name):
    call = method(name, average_tokens=150)
    assert abs(average(call) - 150) < 2
