"""Methods that pick greedily: by hand, against slow readings of their rules, and exact counts."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.contract import (
    ClipImage,
    ClipText,
    ClsAttention,
    Decoder,
    EncoderFeatures,
    Features,
    LayerSignal,
    ModelShape,
    PixelSeed,
    ReceivedAttention,
    TextEmbeddings,
    Tower,
    VisualTokens,
)
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.methods.before_llm.cdpruner import relevance
from vlmprune.prune.ops import cosine, facility
from vlmprune.prune.ops.cosine import gram
from vlmprune.prune.ops.dispersion import greedy_dispersion
from vlmprune.prune.ops.dpp import greedy_map, weighted_cosines, weighted_greedy_map
from vlmprune.prune.ops.facility import greedy_cover
from vlmprune.prune.ops.spread import share
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Block, Tiling

DECODER = Decoder(num_layers=32, hidden_size=64, intermediate_size=128)
TOWERS = {
    "clip": Tower(num_layers=24, has_cls=True, text_twin=True),
    "siglip": Tower(num_layers=27, has_cls=False),
    "windowed": Tower(num_layers=32, has_cls=False, merge_unit=4, full_attention=(7, 15, 23, 31)),
    "one layer": Tower(num_layers=1, has_cls=True),
}
THUMBNAIL = Block((4,), (4,))
TILINGS = {
    "plain": Tiling.single(3, 5),
    "two": Tiling.single(1, 2),
    "line": Tiling.single(1, 7),
    "plain with newlines": Tiling((Block((4,), (3,), "rows"),)),
    "2 x 2": Tiling((THUMBNAIL, Block((4, 4), (4, 4)))),
    "2 x 2 with newlines": Tiling((THUMBNAIL, Block((4, 4), (4, 4), "rows"))),
    "without padding": Tiling((THUMBNAIL, Block((1, 4, 1), (4,), "rows"))),
    "with a lost tile": Tiling((THUMBNAIL, Block((3, 4), (4, 0, 2), "rows"))),
    "video": Tiling((*[Block((2,), (3,))] * 3, Block((2,), (3,), "end"))),
}
CALLS = [
    ("vispruner", {}),
    ("vispruner", {"important": 0.0}),
    ("vispruner", {"important": 1.0, "scores": "received"}),
    ("vispruner", {"important": 0.3, "newlines": "keep"}),
    ("cdpruner", {}),
    ("cdpruner", {"newlines": "keep"}),
    ("todre", {}),
    ("todre", {"rule": "k_center", "pivot": "received"}),
    ("todre", {"pivot": "random", "newlines": "keep"}),
    ("catp", {}),
    ("catp", {"scope": "tile", "alignment": 3}),
]
IDS = [f"{name}-{'-'.join(map(str, fields.values()))}" for name, fields in CALLS]


def rand(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def shape_of(tower: str = "clip") -> ModelShape:
    return ModelShape(tower=TOWERS[tower], decoder=DECODER)


def read_before_the_llm(method, shape: ModelShape) -> list:
    """Its signals without those of a second stage in the decoder."""
    return [signal for signal in method.needs(shape) if not isinstance(signal, LayerSignal)]


def make_tokens(method, tiling: Tiling, *, tower="clip", seed=0, constant=False) -> VisualTokens:
    shape, patches, signals = shape_of(tower), tiling.num_patches, {}
    for number, signal in enumerate(read_before_the_llm(method, shape)):
        sizes = {ClipText: (2, 6), ClipImage: (patches, 6), TextEmbeddings: (3, 8)}
        sizes |= {Features: (patches, 8), EncoderFeatures: (patches, 8), PixelSeed: ()}
        size = sizes.get(type(signal), (patches,))
        signals[signal] = torch.ones(size) if constant else rand(seed * 10 + number, *size)
        if isinstance(signal, PixelSeed):
            signals[signal] = torch.tensor(seed + 12345)
    return VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=shape, signals=signals)


def given_signals(method, tiling: Tiling, *values, tower="clip") -> VisualTokens:
    """Tokens with these signals, in the order of the method's needs."""
    shape = shape_of(tower)
    needs = read_before_the_llm(method, shape)
    signals = dict(zip(needs, map(torch.as_tensor, values), strict=True))
    return VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=shape, signals=signals)


def unit_of(features: torch.Tensor) -> torch.Tensor:
    return features.double() / features.double().norm(dim=-1, keepdim=True)


def circle(*degrees: float) -> torch.Tensor:
    """Vectors of different lengths at these angles."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1, len(degrees) + 1)[:, None]


# --- All of them -----------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_every_count_is_exact(name, fields, tiling):
    method = method_class(name)(**fields)
    least = tiling.num_newlines + 1 if method.newline_policy == "keep" else 1
    step = 1 if tiling.num_tokens < 30 else 11
    counts = {*range(least, tiling.num_tokens, step), tiling.num_tokens - 1}
    for constant in (False, True):
        tokens = make_tokens(method, tiling, constant=constant)
        for keep in sorted(counts):
            chosen = select(method, tokens, keep)
            kept = chosen.kept.tolist()
            assert kept == sorted(set(kept)) and len(kept) == keep
            assert kept[0] >= 0 and kept[-1] < tiling.num_tokens
            assert chosen.order is None and chosen.features is None


@pytest.mark.parametrize("tiling", ["plain", "2 x 2 with newlines", "without padding"])
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_inputs_stay_and_results_repeat(name, fields, tiling):
    method = method_class(name)(**fields)
    for constant in (False, True):
        tokens = make_tokens(method, TILINGS[tiling], constant=constant)
        before = {signal: tensor.clone() for signal, tensor in tokens.signals.items()}
        first, second = (select(method, tokens, 14).kept for _ in range(2))
        for signal, tensor in tokens.signals.items():
            assert tensor._version == 0
            assert torch.equal(tensor, before[signal])
        assert torch.equal(first, second)


@pytest.mark.parametrize(("name", "fields"), [c for c in CALLS if c[0] != "vispruner"])
def test_ties_go_to_the_lower_index(name, fields):
    method = method_class(name)(**fields)
    tokens = make_tokens(method, Tiling.single(5, 6), constant=True)
    if fields.get("pivot") == "random":
        tokens = replace(tokens, signals={**tokens.signals, PixelSeed(): torch.tensor(30)})
    for keep in (1, 2, 13, 29):
        assert select(method, tokens, keep).kept.tolist() == list(range(keep))


@pytest.mark.parametrize("tiling", ["plain", "2 x 2", "without padding", "video"])
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_nothing_waits_for_the_device(name, fields, tiling, monkeypatch):
    """Fake tensors have no values: whatever asked for one would raise.

    On the CPU, catp asks how many rows changed; here it runs as on an accelerator.
    """
    monkeypatch.setattr(facility, "_reads_all", lambda unit: True)
    method = method_class(name)(**fields)
    tokens = make_tokens(method, TILINGS[tiling].without_newlines())
    select(method, tokens, 6)  # fills the caches with real tensors
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        signals = {signal: mode.from_tensor(t) for signal, t in tokens.signals.items()}
        assert select(method, replace(tokens, signals=signals), 6).count == 6


@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_scores_are_float32(name, fields):
    """bfloat16 signals choose what the same numbers in float32 choose."""
    method = method_class(name)(**fields)
    tokens = make_tokens(method, TILINGS["without padding"])
    low = {s: t.bfloat16() if t.is_floating_point() else t for s, t in tokens.signals.items()}
    high = {s: t.float() if t.is_floating_point() else t for s, t in low.items()}
    kept = [select(method, replace(tokens, signals=s), 17).kept for s in (low, high)]
    assert torch.equal(*kept)


@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_survives_tokens_of_zeros(name, fields):
    method = method_class(name)(**fields)
    tokens = make_tokens(method, TILINGS["plain"])
    signals = {}
    for signal, tensor in tokens.signals.items():
        signals[signal] = tensor.clone()
        if tensor.ndim == 2:
            signals[signal][:2] = 0
    for keep in range(1, 15):
        assert select(method, replace(tokens, signals=signals), keep).count == keep


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("vispruner", "important", -0.1),
        ("vispruner", "important", math.nan),
        ("vispruner", "layer", 1.5),
        ("vispruner", "scores", "mean"),
        ("vispruner", "scope", "image"),
        ("cdpruner", "scope", "tile"),
        ("cdpruner", "newlines", "compete"),
        ("todre", "rule", "max_min"),
        ("todre", "pivot", "first"),
        ("todre", "layer", "last"),
        ("catp", "alignment", -1),
        ("catp", "alignment", True),
        ("catp", "alignment", math.inf),
        ("catp", "alignment", math.nan),
        ("catp", "alignment", "0.7"),
    ],
)
def test_a_wrong_field_is_refused(name, field, value):
    with pytest.raises(MethodFieldError, match=f"{field}=") as caught:
        method_class(name)(**{field: value})
    assert "give " in str(caught.value) or "use " in str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "layers"),
    [
        ("vispruner", {"scores": "received"}, {"clip": 22, "siglip": 25, "windowed": 31}),
        ("vispruner", {"scores": "received", "layer": 7}, {"clip": 7, "windowed": 7}),
        ("todre", {"pivot": "received"}, {"clip": 23, "siglip": 26, "windowed": 31}),
        ("todre", {"pivot": "received", "layer": 3}, {"clip": 3, "siglip": 3}),
        ("vispruner", {"scores": "received"}, {"one layer": 0}),
    ],
)
def test_layers(name, fields, layers):
    method = method_class(name)(**fields)
    for tower, layer in layers.items():
        assert ReceivedAttention(layer) in method.needs(shape_of(tower))


def test_what_towers_lack():
    """Only what reads CLS, or CLIP's text, is refused."""
    lacking = [
        (name, fields)
        for name, fields in CALLS
        if any(map(shape_of("siglip").lacks, method_class(name)(**fields).needs(shape_of())))
    ]
    assert lacking == [
        ("vispruner", {}),
        ("vispruner", {"important": 0.0}),
        ("vispruner", {"important": 0.3, "newlines": "keep"}),
        ("cdpruner", {}),
        ("cdpruner", {"newlines": "keep"}),
        ("todre", {}),
    ]


@pytest.mark.parametrize("size", [1, 2, 7, 8, 9, 31, 64, 101])
def test_gram_multiplies_all_pairs(size, monkeypatch):
    monkeypatch.setattr(cosine, "_LEAF", 8)
    rows = rand(size, size, 5)
    torch.testing.assert_close(gram(rows), rows @ rows.T)


# --- vispruner -------------------------------------------------------------------------------


def prune_round_by_round(scores, features, keep, important) -> list[int]:
    """The published steps on lists of tokens."""
    unit = unit_of(features)
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    first = int(keep * important)
    rest, wanted = ranked[first:], keep - first
    while wanted and len(rest) > wanted:
        drop = min(8, len(rest) - wanted)
        a, b = rest[::2], rest[1::2]
        alike = {i: max(float(unit[i] @ unit[j]) for j in b) for i in a}
        rest = sorted(a, key=lambda i: -alike[i])[drop:] + b
    return sorted(ranked[:first] + (rest if wanted else []))


@pytest.mark.parametrize("important", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (3, 17), (1, 9)])
def test_vispruner_is_the_published_one(grid, important):
    """Odd numbers of tokens included, where the official code fails."""
    method = method_class("vispruner")(important=important)
    tokens = make_tokens(method, Tiling.single(*grid), seed=sum(grid))
    scores, features = tokens.signals.values()
    for keep in range(1, math.prod(grid)):
        expected = prune_round_by_round(scores.tolist(), features, keep, important)
        assert method.select(tokens, keep).kept.tolist() == expected


def test_vispruner_by_hand():
    """Seven tokens, four kept: two by attention, then one round on the five that are left."""
    method = method_class("vispruner")()
    scores = [0.1, 0.9, 0.5, 0.4, 0.8, 0.3, 0.2]
    # By attention 1, 4 | 2, 3, 5, 6, 0. Compared are 2, 5 and 0 with 3 and 6; the three that are
    # most alike to those go, as three are too many. 5 equals 3, 2 is near 6: only 0 would stay,
    # but of five tokens two are to stay, which are 3 and 6.
    features = circle(200, 0, 92, 10, 0, 10, 90)
    tokens = given_signals(method, Tiling.single(1, 7), scores, features)
    assert method.select(tokens, 4).kept.tolist() == [1, 3, 4, 6]
    # Six kept, three of them by attention (1, 4, 2) and three of 3, 5, 6, 0: 3 and 6 are compared
    # with 5 and 0, and 3 goes, which equals 5.
    assert method.select(tokens, 6).kept.tolist() == [0, 1, 2, 4, 5, 6]


# --- cdpruner --------------------------------------------------------------------------------


def best_determinants(kernel: torch.Tensor, count: int) -> list[int]:
    """Greedy picks by the determinants themselves."""
    kernel, picks = kernel.double(), []
    for _ in range(count):
        gains = [
            -1.0 if i in picks else float(torch.det(kernel[[*picks, i]][:, [*picks, i]]))
            for i in range(len(kernel))
        ]
        picks.append(gains.index(max(gains)))
    return picks


def test_greedy_map_maximises_determinants():
    weights = torch.stack([rand(s + 50, 24).abs() + 0.1 for s in range(4)])
    kernels = weighted_cosines([rand(s, 24, 12) for s in range(4)], weights)
    picks = greedy_map(kernels, 9, torch.zeros(4, 24))
    assert picks.tolist() == [best_determinants(kernel, 9) for kernel in kernels]
    for fewer in (1, 5):
        assert torch.equal(greedy_map(kernels, fewer, torch.zeros(4, 24)), picks[:, :fewer])


def test_kernel_by_definition():
    features, weights = rand(1, 10, 6), rand(2, 10).abs()
    unit = unit_of(features)
    expected = weights[:, None] * (unit @ unit.T) * weights
    (kernel,) = weighted_cosines([features], weights[None])
    torch.testing.assert_close(kernel.double(), expected.double())


@pytest.mark.parametrize("stored", [True, False])
def test_weighted_greedy_map_with_and_without_its_kernels(stored, monkeypatch):
    """Three images of which a part holds two; one has a token of zeros and one of no weight."""
    monkeypatch.setattr(cosine, "STORE_UP_TO", 40 if stored else 0)
    images = [rand(s, 28, 40) for s in range(3)]
    weights = torch.stack([rand(s + 50, 28).abs() + 0.1 for s in range(3)])
    images[1][3], weights[1, 5] = 0, 0
    picks = weighted_greedy_map(images, weights, 28)
    for found, kernel in zip(picks, weighted_cosines(images, weights), strict=True):
        assert sorted(found.tolist()) == list(range(28))
        assert found[:26].tolist() == best_determinants(kernel, 26)
    assert picks[1, 26:].tolist() == [3, 5], "by weight"


def test_greedy_map_goes_on_where_the_rank_ends():
    """Three directions, each of them twice: then the others, by what is given for them."""
    kernel = torch.eye(3).repeat(2, 2)
    kernel[0, 0] = kernel[3, 3] = kernel[0, 3] = kernel[3, 0] = 4
    fallback = torch.tensor([0, 0, 0, 0.5, 0.9, 0.7])
    other = torch.eye(6)
    picks = greedy_map(torch.stack([kernel, other]), 6, torch.stack([fallback, fallback]))
    assert picks.tolist() == [[0, 1, 2, 4, 5, 3], [0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_greedy_map_never_repeats_a_token(rank, stored, monkeypatch):
    """The same up to rounding, which makes some of what is left positive."""
    monkeypatch.setattr(cosine, "STORE_UP_TO", 1000 if stored else 0)
    features = rand(rank, 30, rank) @ rand(rank + 1, rank, 16)
    weights = rand(3, 30).abs() + 0.1
    (kernel,) = weighted_cosines([features], weights[None])
    picks = weighted_greedy_map([features], weights[None], 30)[0].tolist()
    assert sorted(picks) == list(range(30))
    assert picks[:rank] == best_determinants(kernel, rank)


def test_relevance_is_unlikeness_to_the_text():
    image, text = circle(0, 90, 180, 60), circle(0, 0)
    scaled = [1e-6 / 2, 0.5, 1, 0.25]
    torch.testing.assert_close(relevance(image, text), torch.tensor(scaled), atol=1e-6, rtol=1e-6)
    two = relevance(image, torch.tensor([[1.0, 0], [0, 3]]))  # the mean over segments counts
    assert two.argmax() == 2 and two.argmin() == 3
    assert relevance(image[:1].repeat(4, 1), text).tolist() == [1] * 4
    assert relevance(image, text[:0]).tolist() == [1] * 4


@pytest.mark.parametrize("tiling", ["2 x 2", "without padding", "with a lost tile", "video"])
@pytest.mark.parametrize("keep", [2, 5, 17, 19])
def test_cdpruner_weighs_over_the_image_and_picks_in_each_tile(tiling, keep):
    method, tiling = method_class("cdpruner")(), TILINGS[tiling].without_newlines()
    tokens = make_tokens(method, tiling, seed=keep)
    features, image, text = tokens.signals.values()
    image = image * torch.linspace(0.1, 3, len(image))[:, None] + 1  # unequal tiles
    tokens = replace(tokens, signals={**tokens.signals, ClipImage(): image})
    weights = relevance(image, text)
    tiles = tiling.tile_patches(torch.device("cpu"))
    expected = []
    for tile, count in zip(tiles, share(keep, [len(tile) for tile in tiles]), strict=True):
        (kernel,) = weighted_cosines([features[tile]], weights[None, tile])
        expected += tile[best_determinants(kernel, min(count, 8))].tolist()
        assert count <= 8, "no more than the rank"
    assert method.select(tokens, keep).kept.tolist() == sorted(expected)


# --- todre -----------------------------------------------------------------------------------


def disperse(features, first, count, rule) -> list[int]:
    """Sums and maxima over all earlier picks, anew for every pick."""
    unit = unit_of(features)
    similar, picks = unit @ unit.T, [first]
    total = {"max_sum": sum, "k_center": max}[rule]
    while len(picks) < count:
        left = [i for i in range(len(unit)) if i not in picks]
        picks.append(min(left, key=lambda i: total(float(similar[i, p]) for p in picks)))
    return picks


@pytest.mark.parametrize("rule", ["max_sum", "k_center"])
@pytest.mark.parametrize("stored", [True, False])
def test_dispersion_is_the_plain_one(rule, stored, monkeypatch):
    monkeypatch.setattr(cosine, "STORE_UP_TO", 1000 if stored else 0)
    for seed in range(5):
        features = rand(seed, 40, 10)
        picks = greedy_dispersion([features], torch.tensor([seed + 3]), 39, rule)[0]
        assert picks.tolist() == disperse(features, seed + 3, 39, rule)


def test_todre_by_hand():
    """The farthest from 0 degrees is 160. Then 150 has the smaller sum of cosines (-0.87 + 0.98;
    60: 0.50 - 0.17), but is nearer to one pick (0.98) than 60 is (0.50)."""
    features, scores = circle(0, 150, 160, 60), [0.9, 0.3, 0.1, 0.2]
    for rule, expected in (("max_sum", [0, 1, 2]), ("k_center", [0, 2, 3])):
        method = method_class("todre")(rule=rule)
        tokens = given_signals(method, Tiling.single(2, 2), features, scores)
        assert method.select(tokens, 3).kept.tolist() == expected


@pytest.mark.parametrize("pivot", ["cls", "received"])
def test_todre_starts_where_attention_is_largest(pivot):
    """In the thumbnail of a tiled image, among all frames of a video."""
    method = method_class("todre")(pivot=pivot)
    signal = (ClsAttention if pivot == "cls" else ReceivedAttention)(23)
    for tiling, start in (("2 x 2 with newlines", 5), ("without padding", 5), ("video", 20)):
        tokens = make_tokens(method, TILINGS[tiling].without_newlines())
        scores = torch.zeros(tokens.num_tokens)
        scores[[3, 5, 20, 22]] = torch.tensor([0.1, 0.2, 0.4, 0.4])
        tokens = replace(tokens, signals={**tokens.signals, signal: scores})
        assert method.select(tokens, 1).kept.tolist() == [start]
        features = tokens.signals[Features()]
        assert method.select(tokens, 9).kept.tolist() == sorted(
            disperse(features, start, 9, "max_sum")
        )


def test_todre_random_pivot_depends_on_the_pixels():
    method = method_class("todre")(pivot="random")
    starts = {}
    for tiling in ("2 x 2", "video", "plain"):
        tokens = make_tokens(method, TILINGS[tiling].without_newlines())
        found = []
        for seed in range(10_000, 10_040):
            signals = {**tokens.signals, PixelSeed(): torch.tensor(seed)}
            found += method.select(replace(tokens, signals=signals), 1).kept.tolist()
        starts[tiling] = set(found)
    assert starts == {"2 x 2": {*range(16)}, "video": {*range(24)}, "plain": {*range(15)}}


# --- catp ------------------------------------------------------------------------------------


def cover(features, text, keep, weight=0.7) -> list[int]:
    """The published sum, computed anew for every set of picks."""
    unit = unit_of(features)
    similar = (unit @ unit.T + 1) / 2
    aligned = torch.zeros(len(unit), dtype=torch.float64)
    if len(text):
        aligned = (unit @ unit_of(text.mean(0, keepdim=True))[0] + 1) / 2

    def value(picks: list[int]) -> float:
        return float(similar[:, picks].amax(1).sum() + weight * aligned[picks].sum())

    picks: list[int] = []
    for _ in range(keep):
        left = [i for i in range(len(unit)) if i not in picks]
        picks.append(max(left, key=lambda i: value([*picks, i])))
    return picks


@pytest.mark.parametrize("path", ["changed rows", "all rows", "not stored"])
def test_cover_is_the_plain_one(path, monkeypatch):
    monkeypatch.setattr(facility, "_BLOCK", 16)
    monkeypatch.setattr(cosine, "STORE_UP_TO", 0 if path == "not stored" else 1000)
    monkeypatch.setattr(facility, "_reads_all", lambda unit: path == "all rows")
    for seed in range(4):
        features, text = rand(seed, 40, 12), rand(seed + 9, 5, 12)
        bonus = (unit_of(features) @ unit_of(text.mean(0, keepdim=True))[0] + 1) / 2
        picks = greedy_cover(unit_of(features).float(), 0.7 * bonus.float(), 30)
        assert picks.tolist() == cover(features, text, 30)


@given(
    st.integers(2, 24), st.floats(0, 1), st.floats(0, 5), st.integers(0, 4), st.integers(0, 2**31)
)
def test_every_pick_of_cover_adds_most(num_tokens, part, weight, words, seed):
    """Up to float32: of two tokens that add the same to six digits, either may be first."""
    features, text = rand(seed, num_tokens, 6), rand(seed + 1, words, 6)
    unit = unit_of(features)
    bonus = weight * (unit @ unit_of(text.mean(0, keepdim=True))[0] + 1) / 2
    bonus = bonus if words else torch.zeros(num_tokens)
    similar, covered = (unit @ unit.T + 1) / 2, torch.zeros(num_tokens)
    picks = greedy_cover(unit.float(), bonus, max(1, round(part * num_tokens))).tolist()
    assert len(set(picks)) == len(picks)
    for i, pick in enumerate(picks):
        gains = (similar - covered).clamp_min(0).sum(1) + bonus
        gains[picks[:i]] = -torch.inf
        assert gains[pick] >= gains.max() - 1e-5
        covered = torch.maximum(covered, similar[pick])


@pytest.mark.parametrize("stored", [True, False])
def test_cover_breaks_ties_by_index(stored, monkeypatch):
    """Two tokens stand for each other equally, whatever rounding makes of their length."""
    monkeypatch.setattr(cosine, "STORE_UP_TO", 1000 if stored else 0)
    for seed in range(20):
        unit = unit_of(rand(seed, 2, 6)).float()
        assert greedy_cover(unit, torch.zeros(2), 1).tolist() == [0]


@pytest.mark.parametrize("scope", ["image", "tile"])
def test_catp_is_the_plain_one(scope):
    method = method_class("catp")(scope=scope, alignment=1.5)
    tiling = TILINGS["2 x 2"]
    tokens = make_tokens(method, tiling)
    features, text = tokens.signals.values()
    parts = tiling.tile_patches(torch.device("cpu"))
    parts = [torch.cat(list(parts))] if scope == "image" else parts
    expected = []
    for part in parts:
        expected += part[cover(features[part], text, 15 // len(parts), 1.5)].tolist()
    assert select(method, tokens, 15).kept.tolist() == sorted(expected)


def test_catp_by_hand():
    """Three tokens at 0 degrees and one at 90, which adds 0.5 by coverage after the first pick.

    A second one of the three adds nothing, but at weight 1 the text gives it 0.5 more."""
    features, text = circle(0, 90, 0, 0), circle(0, 0)
    for weight, expected in ((0.7, [0, 1]), (1.3, [0, 2])):
        method = method_class("catp")(alignment=weight)
        tokens = given_signals(method, Tiling.single(2, 2), features, text)
        assert method.select(tokens, 2).kept.tolist() == expected


def test_catp_without_text_covers_only():
    method = method_class("catp")()
    features = rand(5, 12, 6)
    tokens = given_signals(method, Tiling.single(3, 4), features, torch.zeros(0, 6))
    expected = method_class("catp")(alignment=0).select(
        given_signals(method, Tiling.single(3, 4), features, rand(6, 2, 6)), 5
    )
    assert torch.equal(method.select(tokens, 5).kept, expected.kept)
