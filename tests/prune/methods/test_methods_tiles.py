"""Methods that weigh tiles and chunks: by hand, against slow readings of their rules, and exact."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.golden import load
from kit.golden_tiles import OfficialGlobalCom2, OfficialHiRED, OfficialHoloV
from kit.paths import TESTS
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cosine_similarity, interpolate
from vlmprune.prune.contract import (
    AttentionToCls,
    ClsAttention,
    ClsLogits,
    Decoder,
    Features,
    ModelShape,
    ReceivedAttention,
    Tower,
    VisualTokens,
)
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.methods.before_llm import holov
from vlmprune.prune.ops.parts import apportion, canvas_of, sums_of_crops, tile_numbers, top_of_each
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Block, Tiling

CPU = torch.device("cpu")
DECODER = Decoder(num_layers=32, hidden_size=64, intermediate_size=128)
TOWERS = {
    "clip": Tower(num_layers=24, has_cls=True),
    "siglip": Tower(num_layers=27, has_cls=False),
    "windowed": Tower(num_layers=32, has_cls=False, merge_unit=4, full_attention=(7, 15, 23, 31)),
    "merging": Tower(num_layers=32, has_cls=False, merge_unit=4),
    "one layer": Tower(num_layers=1, has_cls=True),
}
THUMBNAIL = Block((4,), (4,))
TILINGS = {
    "plain": Tiling.single(3, 5),
    "two": Tiling.single(1, 2),
    "line": Tiling.single(1, 7),
    "tall": Tiling.single(9, 1),
    "plain with newlines": Tiling((Block((4,), (3,), "rows"),)),
    "2 x 2": Tiling((THUMBNAIL, Block((4, 4), (4, 4)))),
    "2 x 2 with newlines": Tiling((THUMBNAIL, Block((4, 4), (4, 4), "rows"))),
    "without padding": Tiling((THUMBNAIL, Block((1, 4, 1), (4,), "rows"))),
    "with a lost tile": Tiling((THUMBNAIL, Block((3, 4), (4, 0, 2), "rows"))),
    "one crop": Tiling((THUMBNAIL, Block((2,), (3,), "rows"))),
    "video": Tiling((*[Block((2,), (3,))] * 3, Block((2,), (3,), "end"))),
}
CALLS = [
    ("cls_topk", {}),
    ("cls_topk", {"scope": "image", "scores": "received"}),
    ("vtc_cls", {}),
    ("vtc_cls", {"scores": "received"}),
    ("fopru", {}),
    ("fopru", {"axis": "auto"}),
    ("fopru", {"axis": "given", "strategy": "row"}),
    ("fopru", {"strategy": "row", "scope": "image"}),
    ("hired", {}),
    ("hired", {"alpha": 0.0}),
    ("hired", {"alpha": 1.0}),
    ("hired", {"scores": "received", "alpha": 0.3}),
    ("globalcom2", {}),
    ("globalcom2", {"newlines": "drop", "temperature": 0.1}),
    ("globalcom2", {"scores": "received"}),
    ("holov", {}),
    ("holov", {"num_chunks": 3, "alpha": 5.0}),
    ("holov", {"num_chunks": 1000}),
    ("holov", {"scope": "tile", "scores": "received"}),
]
IDS = [f"{name}-{'-'.join(map(str, fields.values()))}" for name, fields in CALLS]


def shape_of(tower: str = "clip") -> ModelShape:
    return ModelShape(tower=TOWERS[tower], decoder=DECODER)


def make_tokens(method, tiling: Tiling, *, tower="clip", seed=0, constant=False) -> VisualTokens:
    shape, patches = shape_of(tower), tiling.num_patches
    generator = torch.Generator().manual_seed(seed)
    signals = {}
    for signal in method.needs(shape):
        size = (patches, 8) if isinstance(signal, Features) else (patches,)
        if constant:
            signals[signal] = torch.full(size, 0.25)
        elif isinstance(signal, Features | ClsLogits):
            signals[signal] = torch.randn(size, generator=generator) - 1
        else:
            signals[signal] = torch.rand(size, generator=generator) ** 4
    return VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=shape, signals=signals)


def given_signals(method, tiling: Tiling, *values, tower="clip") -> VisualTokens:
    """Tokens with these signals, in the order of the method's needs."""
    shape = shape_of(tower)
    tensors = [torch.as_tensor(value, dtype=torch.float32) for value in values]
    signals = dict(zip(method.needs(shape), tensors, strict=True))
    return VisualTokens(num_tokens=tiling.num_tokens, tiling=tiling, shape=shape, signals=signals)


def least(method, tiling: Tiling) -> int:
    return tiling.num_newlines + 1 if method.newline_policy == "keep" else 1


def counts(method, tiling: Tiling) -> list[int]:
    """Every count of a small image; of others the smallest, the largest and some between."""
    low, high = least(method, tiling), tiling.num_tokens
    step = 1 if high < 30 else 11
    return sorted({*range(low, high, step), low + 1, high - 2, high - 1} & set(range(low, high)))


# --- All of them -----------------------------------------------------------------------------


@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_every_count_is_exact(name, fields, tiling):
    method = method_class(name)(**fields)
    for constant in (False, True):
        tokens = make_tokens(method, tiling, constant=constant)
        for keep in counts(method, tiling):
            chosen = select(method, tokens, keep)
            kept = chosen.kept.tolist()
            assert kept == sorted(set(kept)) and len(kept) == keep
            assert kept[0] >= 0 and kept[-1] < tiling.num_tokens
            assert chosen.order is None or sorted(chosen.order.tolist()) == kept


@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_runs_on_every_tower_that_has_its_signals(name, fields, tower):
    method, shape = method_class(name)(**fields), shape_of(tower)
    needs = method.needs(shape)
    assert len(set(needs)) == len(needs)
    for signal in needs:
        layer = getattr(signal, "layer", 0)
        assert 0 <= layer < shape.tower.num_layers
        assert (
            not isinstance(signal, ReceivedAttention)
            or shape.tower.full_attention is None
            or (layer in shape.tower.full_attention)
        )
    reads_cls = fields.get("axis") == "given" or (
        name != "fopru" and fields.get("scores") != "received"
    )
    assert any(map(shape.lacks, needs)) == (reads_cls and not shape.tower.has_cls)
    tokens = make_tokens(method, TILINGS["without padding"], tower=tower)
    assert select(method, tokens, 20).count == 20


@pytest.mark.parametrize("tiling", ["plain", "2 x 2 with newlines", "without padding"])
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_inputs_stay_and_results_repeat(name, fields, tiling):
    method = method_class(name)(**fields)
    for constant in (False, True):
        tokens = make_tokens(method, TILINGS[tiling], constant=constant)
        before = {signal: tensor.clone() for signal, tensor in tokens.signals.items()}
        first, second = select(method, tokens, 14), select(method, tokens, 14)
        for signal, tensor in tokens.signals.items():
            assert tensor._version == 0
            assert torch.equal(tensor, before[signal])
        assert torch.equal(first.kept, second.kept)
        assert (first.order is None) == (second.order is None)
        assert first.order is None or torch.equal(first.order, second.order)


@pytest.mark.parametrize("tiling", ["plain", "2 x 2", "without padding", "video"])
@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_nothing_waits_for_the_device(name, fields, tiling):
    """Fake tensors have no values: whatever asked for one would raise."""
    method = method_class(name)(**fields)
    tokens = make_tokens(method, TILINGS[tiling].without_newlines())
    keep = 6
    select(method, tokens, keep)  # fills the caches with real tensors
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        signals = {signal: mode.from_tensor(t) for signal, t in tokens.signals.items()}
        assert select(method, replace(tokens, signals=signals), keep).count == keep


@pytest.mark.parametrize(("name", "fields"), CALLS, ids=IDS)
def test_scores_are_float32(name, fields):
    """bfloat16 signals choose what the same numbers in float32 choose."""
    method = method_class(name)(**fields)
    tokens = make_tokens(method, TILINGS["without padding"])
    low = {signal: tensor.bfloat16() for signal, tensor in tokens.signals.items()}
    high = {signal: tensor.float() for signal, tensor in low.items()}
    kept = [select(method, replace(tokens, signals=s), 17).kept for s in (low, high)]
    assert torch.equal(*kept)


def test_scopes_and_newlines_of_the_papers():
    classes = {name: method_class(name) for name, _ in CALLS}
    assert {name: (c().scope_used, c().newline_policy) for name, c in classes.items()} == {
        "cls_topk": ("tile", "drop"),
        "vtc_cls": ("tile", "drop"),
        "fopru": ("tile", "drop"),
        "hired": ("image", "drop"),
        "globalcom2": ("image", "keep"),
        "holov": ("image", "drop"),
    }


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *[(name, "scores", "mean") for name in ("cls_topk", "vtc_cls", "hired", "globalcom2")],
        *[(name, "layer", 2.0) for name in ("cls_topk", "fopru", "hired", "globalcom2", "holov")],
        ("fopru", "strategy", "column"),
        ("fopru", "axis", None),
        ("hired", "alpha", 1.1),
        ("hired", "budget_layer", "first"),
        ("globalcom2", "temperature", 0),
        ("globalcom2", "temperature", math.nan),
        ("globalcom2", "temperature", True),
        ("holov", "num_chunks", 0),
        ("holov", "num_chunks", 2.0),
        ("holov", "alpha", -1),
        ("holov", "alpha", math.inf),
        ("holov", "scores", None),
        ("hired", "scope", "tile"),
        ("globalcom2", "scope", "tile"),
        ("globalcom2", "newlines", "compete"),
    ],
)
def test_a_wrong_field_is_refused(name, field, value):
    with pytest.raises(MethodFieldError, match=f"{field}=") as caught:
        method_class(name)(**{field: value})
    assert "give " in str(caught.value) or "use " in str(caught.value)


# --- Counts of parts -------------------------------------------------------------------------


def fair(total: int, weights: list[int], sizes: list[int]) -> list[int]:
    """`apportion` in exact numbers: fill up part by part, then the largest remainders."""
    weights = [Fraction(w) for w in weights]
    quotas, free = [Fraction(0)] * len(sizes), set(range(len(sizes)))
    left = Fraction(total)
    while left and any(weights[i] for i in free):
        heavy = sum(weights[i] for i in free)
        over = {i for i in free if weights[i] and left * weights[i] >= heavy * sizes[i]}
        for i in over or free:
            quotas[i] = Fraction(sizes[i]) if over else left * weights[i] / heavy
        free -= over or free
        left = total - sum(quotas)
    room = [size - quota for size, quota in zip(sizes, quotas, strict=True)]
    if left:
        quotas = [q + left * r / sum(room) for q, r in zip(quotas, room, strict=True)]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 30)), min_size=1, max_size=12),
    st.floats(0, 1),
)
def test_apportion_is_fair_and_exact(parts, share):
    weights, sizes = map(list, zip(*parts, strict=True))
    total = round(share * sum(sizes))
    counts = apportion(total, torch.tensor(weights), sizes).tolist()
    assert sum(counts) == total
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))
    assert counts == fair(total, weights, sizes)


@pytest.mark.parametrize(
    ("total", "weights", "sizes", "counts"),
    [
        (10, [1, 1, 1], [9, 9, 9], [4, 3, 3]),
        (10, [9, 1, 1], [4, 9, 9], [4, 3, 3]),  # what the first cannot take
        (10, [1, 0, 0], [4, 9, 3], [4, 5, 1]),  # by room where no weight is left
        (5, [0, 0], [4, 4], [3, 2]),
        (8, [1, 2], [4, 4], [4, 4]),
        (0, [1, 2], [4, 4], [0, 0]),
    ],
)
def test_apportion_by_hand(total, weights, sizes, counts):
    assert apportion(total, torch.tensor(weights), sizes).tolist() == counts


def test_apportion_with_a_priority():
    """Quotas 1.5, 2.7, 0.8: of 5, two are left, which remainders give to the last two."""
    weights = torch.tensor([1.5, 2.7, 0.8])
    assert apportion(5, weights, [9, 9, 9]).tolist() == [1, 3, 1]
    assert apportion(5, weights, [9, 9, 9], priority=weights).tolist() == [2, 3, 0]
    # quotas 2, 1.5, 0.5: whole numbers stay, and the heaviest gets the one that is left
    thirds = torch.tensor([4.0, 3, 1]) / 3
    assert apportion(4, thirds, [9, 9, 9], priority=thirds).tolist() == [3, 1, 0]
    # the heaviest is full: the spare one goes to the next
    assert apportion(4, weights, [9, 2, 9], priority=weights).tolist() == [2, 2, 0]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_top_of_each_part(tokens):
    scores, parts = zip(*tokens, strict=True)
    counts = [(parts.count(part) + 1) // 2 for part in range(4)]
    found = top_of_each(
        torch.tensor(scores), torch.tensor(parts), torch.tensor(counts), sum(counts)
    )
    expected = []
    for part in range(4):
        inside = [i for i in range(len(parts)) if parts[i] == part]
        expected += sorted(inside, key=lambda i: (-scores[i], i))[: counts[part]]
    assert found.tolist() == expected


def test_tiles_of_tokens():
    tiling = Tiling((Block((1,), (2,)), Block((1, 1), (2, 0, 1))))
    assert tile_numbers(tiling, CPU).tolist() == [0, 0, 1, 1, 2, 3, 3, 4]
    assert canvas_of(tiling) == tiling.blocks[1]
    for name in ("plain", "line", "video", "one crop"):
        assert canvas_of(TILINGS[name]) is None


def test_regions_of_crops():
    thumbnail = torch.tensor([[1.0, 10], [2, 20], [4, 40]])
    assert sums_of_crops(thumbnail, (2, 1), (1, 1)).tolist() == [3, 30, 4, 40]
    # the border of two rows of crops runs through the middle row; a lost tile has no region
    assert sums_of_crops(thumbnail, (5, 5), (7, 0)).tolist() == [22, 55]
    assert sums_of_crops(thumbnail, (1, 8), (3, 1)).sum() == pytest.approx(77)


# --- cls_topk and vtc_cls --------------------------------------------------------------------


def test_cls_topk_by_tile_and_by_image():
    tiling = Tiling((Block((1,), (4,)), Block((1,), (2, 2), "rows")))
    scores = [0.1, 0.9, 0.8, 0.7, 0.3, 0.2, 0.4, 0.5]
    for scope, kept in (("tile", [1, 2, 4, 7]), ("image", [1, 2, 3, 7])):
        method = method_class("cls_topk")(scope=scope)
        assert select(method, given_signals(method, tiling, scores), 4).kept.tolist() == kept


@pytest.mark.parametrize(
    ("tower", "fields", "needs"),
    [
        ("clip", {}, ClsAttention(22)),
        ("clip", {"layer": -1}, ClsAttention(23)),
        ("clip", {"scores": "received"}, ReceivedAttention(22)),
        ("siglip", {"scores": "received"}, ReceivedAttention(25)),
        ("windowed", {"scores": "received"}, ReceivedAttention(31)),
        ("one layer", {}, ClsAttention(0)),
    ],
)
def test_cls_topk_layers(tower, fields, needs):
    assert method_class("cls_topk")(**fields).needs(shape_of(tower)) == (needs,)


def test_vtc_cls_sums_received_attention():
    method = method_class("vtc_cls")(scores="received")
    layers = [signal.layer for signal in method.needs(shape_of("windowed"))]
    assert layers == [23, 31]
    tokens = given_signals(
        method, Tiling.single(1, 4), [0, 3, 2, 0], [0, 0, 2, 3.5], tower="windowed"
    )
    assert method.select(tokens, 2).kept.tolist() == [2, 3]
    method = method_class("vtc_cls")(scores="received", layer=24)
    with pytest.raises(MethodFieldError, match=r"layer=24.*windowed.*7, 15, 23, 31"):
        method.needs(shape_of("windowed"))


# --- fopru -----------------------------------------------------------------------------------

RECEIVED = [0.5, 0.9, 0.1, 0.8, 0.7, 0.2]
FROM_CLS = [0.1, 0.7, 0.0, 0.1, 0.1, 0.1]  # leaves .4 .2 .1 / .7 .6 .1


def test_fopru_leaves_out_what_cls_gives():
    method = method_class("fopru")()
    tokens = given_signals(method, Tiling.single(2, 3), RECEIVED, FROM_CLS)
    assert [method.select(tokens, k).kept.tolist() for k in (2, 3)] == [[3, 4], [0, 3, 4]]
    tokens = given_signals(method, Tiling.single(2, 3), RECEIVED, tower="siglip")
    assert method.select(tokens, 2).kept.tolist() == [1, 3]


def test_fopru_rows():
    """Whole rows first; the next row gives its best tokens."""
    method = method_class("fopru")(strategy="row")
    tokens = given_signals(method, Tiling.single(2, 3), RECEIVED, FROM_CLS)
    kept = [method.select(tokens, k).kept.tolist() for k in (1, 2, 3, 4, 5)]
    assert kept == [[3], [3, 4], [3, 4, 5], [0, 3, 4, 5], [0, 1, 3, 4, 5]]


def test_fopru_rows_of_tiles():
    """Rows of tiles beside each other are two; longer rows win by their mean, not their sum."""
    method = method_class("fopru")(strategy="row", scope="image")
    tiling = Tiling((Block((1,), (2,)), Block((2,), (3, 1))))
    received = [5, 5, 4, 4, 4, 1, 2, 2, 2, 6]
    tokens = given_signals(method, tiling, received, [0] * 10)
    assert select(method, tokens, 4).kept.tolist() == [0, 1, 2, 9]
    assert select(method, tokens, 9).kept.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize(("spread", "best"), [(0.1, 3), (2.0, 1)])
def test_fopru_takes_the_axis_that_varies_more(spread, best):
    method = method_class("fopru")(axis="auto")
    to_cls = torch.tensor([0.5, 0.0, 0.5, 0.5, 0.5, 0.5]) * spread
    tokens = given_signals(method, Tiling.single(2, 3), RECEIVED, FROM_CLS, to_cls)
    assert method.select(tokens, 1).kept.tolist() == [best]
    given = method_class("fopru")(axis="given")
    tokens = given_signals(given, Tiling.single(2, 3), to_cls)
    assert given.select(tokens, 2).kept.tolist() == [0, 1], "1 gives least to CLS; ties to 0"


def test_fopru_needs():
    clip, siglip = shape_of(), shape_of("siglip")
    received, cls, to_cls = ReceivedAttention(22), ClsAttention(22), AttentionToCls(22)
    needs = {
        axis: [method_class("fopru")(axis=axis).needs(shape) for shape in (clip, siglip)]
        for axis in ("received", "given", "auto")
    }
    assert needs["received"] == [(received, cls), (ReceivedAttention(25),)]
    assert needs["auto"] == [(received, cls, to_cls), (ReceivedAttention(25),)]
    assert needs["given"][0] == (to_cls,)
    assert siglip.lacks(needs["given"][1][0])


# --- hired -----------------------------------------------------------------------------------


def test_hired_by_hand():
    """Of 8, the thumbnail gets 4; the crops share by where its best half of tokens is."""
    method = method_class("hired")()
    tiling = TILINGS["2 x 2"]
    early, late = torch.zeros(16 + 64), torch.arange(80.0)
    early[[3, 7, 11, 15, 2, 6, 10]] = 1
    early[12] = 0.5  # one in the lower left quadrant
    chosen = method.select(given_signals(method, tiling, early, late), 8)
    # right: 4 + 3 marks, left: 0 + 1; quotas 0, 2, 0.5, 1.5, and the first of equal remainders
    tiles = tile_numbers(tiling, CPU)[chosen.kept].tolist()
    assert [tiles.count(tile) for tile in range(5)] == [4, 0, 2, 1, 1]
    assert chosen.kept.tolist() == [12, 13, 14, 15, 46, 47, 75, 79]
    assert chosen.order is None


def test_hired_official_counts_strips():
    """Marks in the right half lie in all four strips alike."""
    tiling = TILINGS["2 x 2"]
    early, late = torch.zeros(80), torch.arange(80.0)
    early[[2, 3, 6, 7, 10, 11, 14, 15]] = 1
    counts = {}
    for official, cls in ((False, method_class("hired")), (True, OfficialHiRED)):
        method = cls()
        chosen = method.select(given_signals(method, tiling, early, late), 11)
        counts[official] = tile_numbers(tiling, CPU)[chosen.kept].bincount(minlength=5).tolist()
    assert counts == {False: [6, 0, 3, 0, 2], True: [5, 1, 1, 1, 1]}


def test_hired_regions_follow_what_is_left_of_the_crops():
    """Rows 1 + 4 + 1 of the canvas: the marks in the thumbnail's middle are in the middle crop."""
    method, tiling = method_class("hired")(), TILINGS["without padding"].without_newlines()
    early, late = torch.zeros(16 + 24), torch.arange(40.0)
    early[4:12] = 1
    chosen = method.select(given_signals(method, tiling, early, late), 10)
    counts = tile_numbers(tiling, CPU)[chosen.kept].bincount(minlength=4)
    assert counts.tolist() == [5, 0, 5, 0]


def test_hired_full_tiles_pass_on_what_they_cannot_take():
    method, tiling = method_class("hired")(), TILINGS["without padding"].without_newlines()
    early, late = torch.zeros(40), torch.arange(40.0)
    early[:4] = 1  # the top row: first crop, 4 patches, and a bit of the second
    for keep in (30, 34, 39):
        kept = method.select(given_signals(method, tiling, early, late), keep).kept
        counts = tile_numbers(tiling, CPU)[kept].bincount(minlength=4).tolist()
        assert sum(counts) == keep
        assert counts[0] == max(min(round(keep / 2), 16), keep - 24)
        assert counts[1] == 4


@pytest.mark.parametrize(
    ("tower", "fields", "layers"),
    [
        ("clip", {}, [0, 22]),
        ("siglip", {"scores": "received"}, [0, 25]),
        ("windowed", {"scores": "received"}, [7, 31]),
        ("one layer", {}, [0]),
        ("clip", {"budget_layer": 2, "layer": -1}, [2, 23]),
    ],
)
def test_hired_layers(tower, fields, layers):
    needs = method_class("hired")(**fields).needs(shape_of(tower))
    assert [signal.layer for signal in needs] == layers


# --- globalcom2 ------------------------------------------------------------------------------


def published_globalcom2(logits, side: int, grid: tuple[int, int], keep: int, temperature: float):
    """The rule read literally for crops without padding: emission order of thumbnail and crops."""
    down, across = grid
    base, canvas = logits[: side * side].view(side, side), logits[side * side :].double()
    ratio = keep / len(logits)
    height, width = side // down, side // across
    sums = [
        base[i * height : (i + 1) * height, j * width : (j + 1) * width].double().sum().item()
        for i in range(down)
        for j in range(across)
    ]
    weights = [math.exp((s - max(sums)) / temperature) for s in sums]
    weights = [w / (sum(weights) + 1e-8) for w in weights]
    mean = sum(weights) / len(weights)
    scales = [min(1.0, ratio * (1 + w - mean)) for w in weights]
    own = round(side * side * ratio)
    quotas = [(keep - own) * scale / sum(scales) for scale in scales]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_remainder[: keep - own - sum(counts)]:
        counts[i] += 1
    size = (down * side, across * side)
    wide = interpolate(base[None, None].double(), size, mode="bilinear")[0, 0]
    chosen = []
    for k, count in enumerate(counts):
        top, left = k // across * side, k % across * side
        region = [(top + y) * size[1] + left + x for y in range(side) for x in range(side)]
        local = canvas[region] / canvas[region].norm()
        shown = wide.flatten()[region] / wide.flatten()[region].norm()
        ranked = sorted(zip((local + shown).tolist(), region, strict=True), reverse=True)
        chosen += [side * side + place for _, place in ranked[:count]]
    return logits[: side * side].argsort(descending=True)[:own].tolist() + sorted(chosen)


@pytest.mark.parametrize("grid", [(2, 2), (1, 2), (3, 1)])
@pytest.mark.parametrize("temperature", [10.0, 1.0])
def test_globalcom2_is_the_published_rule(grid, temperature):
    tiling = Tiling((Block((6,), (6,)), Block((6,) * grid[0], (6,) * grid[1])))
    method = method_class("globalcom2")(temperature=temperature)
    tokens = make_tokens(method, tiling, seed=3)
    (logits,) = tokens.signals.values()
    for keep in (1, 17, 31, 60):
        expected = published_globalcom2(logits, 6, grid, keep, temperature)
        chosen = method.select(tokens, keep)
        assert chosen.order.tolist() == expected
        assert chosen.kept.tolist() == sorted(expected)


@pytest.mark.parametrize("name", ["672x672_r0.25", "w300h900_r0.5"])
def test_globalcom2_scales_are_the_official_ones(name):
    """Also those of the default, where the crops have no padding or are padded alike."""
    golden = load(TESTS / "golden" / f"globalcom2__{name}.npz")
    (across, down), ratio = golden.params["grid_wh"], golden.params["retention_ratio"]
    base = golden.arrays["cls_logits"][0].view(24, 24)
    scales = method_class("globalcom2")()._scales(base, Block((24,) * down, (24,) * across), ratio)
    torch.testing.assert_close(scales, golden.arrays["scales"], rtol=1e-12, atol=0)


def test_globalcom2_regions_without_padding():
    """Constant scores: every crop keeps the same share, however much of its padding is gone."""
    method = method_class("globalcom2")(temperature=0.1)
    tiling = Tiling((THUMBNAIL, Block((2, 6, 2), (4,))))
    tokens = make_tokens(method, tiling, constant=True)
    kept = method.select(tokens, 28).kept
    counts = tile_numbers(tiling, CPU)[kept].bincount().tolist()
    assert counts == [8, 4, 12, 4]


def test_globalcom2_keeps_no_more_than_a_crop():
    """All weight on one crop: without the bound it would have 1.5 times its size in the sharing."""
    base = torch.zeros(4, 4)
    base[:2, :2] = 1000
    scales = method_class("globalcom2")()._scales(base, Block((1, 1), (1, 1)), 0.8)
    torch.testing.assert_close(scales, torch.tensor([1, 0.6, 0.6, 0.6]).double())


def test_globalcom2_layers():
    needs = [
        method_class("globalcom2")(**fields).needs(shape_of(tower))
        for fields, tower in [
            ({}, "clip"),
            ({"layer": -2}, "clip"),
            ({"scores": "received"}, "windowed"),
        ]
    ]
    assert needs == [(ClsLogits(23),), (ClsLogits(22),), (ReceivedAttention(31),)]


def test_globalcom2_without_crops_is_a_thumbnail():
    method = method_class("globalcom2")()
    chosen = method.select(given_signals(method, Tiling.single(1, 5), [3, -1, 5, 0, 4]), 3)
    assert chosen.order.tolist() == [2, 4, 0]
    frames = Tiling((Block((1,), (3,)), Block((1,), (3,))))
    chosen = method.select(given_signals(method, frames, [1, 2, 3, 3, 2, 1]), 3)
    assert chosen.order.tolist() == [2, 1, 3]


def test_globalcom2_keeps_newlines_in_the_count():
    method, tiling = method_class("globalcom2")(), TILINGS["2 x 2 with newlines"]
    chosen = select(method, make_tokens(method, tiling), 30)
    assert set(tiling.newlines(CPU).tolist()) <= set(chosen.kept.tolist())
    assert chosen.count == 30


def test_globalcom2_official_ratio():
    """Counts rounded down from the ratio, whatever the count; without one, from keep / tokens."""
    tiling = TILINGS["2 x 2"]
    given_ratio, derived = OfficialGlobalCom2(retention_ratio=0.25), OfficialGlobalCom2()
    tokens = make_tokens(derived, tiling)
    assert torch.equal(given_ratio.select(tokens, 3).order, derived.select(tokens, 20).order)


# --- holov -----------------------------------------------------------------------------------


def slow_holov(features, attention, crops: list[list[int]], keep: int, alpha: float) -> list[int]:
    """The default's rule, token by token, for a count that overflows no crop."""
    variances = [0.0] * len(attention)
    for crop in crops:
        for i in crop:
            others = [cosine_similarity(features[i], features[j], 0) for j in crop if j != i]
            variances[i] = torch.stack(others).double().var(correction=0).item()
    mean = sum(variances) / len(variances)
    scale = attention.double().mean().item() / (mean + 1e-6)
    scores = [a + alpha * v * scale for a, v in zip(attention.tolist(), variances, strict=True)]
    weights = [sum(scores[i] for i in crop) for crop in crops]
    counts = [math.floor(keep * weight / sum(weights)) for weight in weights]
    for i in sorted(range(len(crops)), key=lambda i: -weights[i])[: keep - sum(counts)]:
        counts[i] += 1
    order = []
    for crop, count in zip(crops, counts, strict=True):
        assert count <= len(crop)
        order += sorted(crop, key=lambda i: -attention[i])[:count]
    return order


@pytest.mark.parametrize("alpha", [0.0, 0.09, 3.0])
def test_holov_is_its_rule(alpha):
    method = method_class("holov")(num_chunks=4, alpha=alpha)
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(36, 8, generator=generator)
    features[:3] = 1
    attention = torch.rand(36, generator=generator) + 0.5
    quadrants = [
        [y * 6 + x for y in range(a, a + 3) for x in range(b, b + 3)]
        for a in (0, 3)
        for b in (0, 3)
    ]
    tokens = given_signals(method, Tiling.single(6, 6), features, attention)
    for keep in (2, 7, 13, 20):
        chosen = method.select(tokens, keep)
        expected = slow_holov(features, attention, quadrants, keep, alpha)
        assert chosen.order.tolist() == expected
        assert chosen.kept.tolist() == sorted(expected)


def test_holov_larger_crops_keep_more():
    """Equal scores, 3 crops in 2 rows: shares as the sizes, 18, 9 and 9 of 36."""
    method = method_class("holov")(num_chunks=3)
    tokens = make_tokens(method, Tiling.single(6, 6), constant=True)
    crops = holov._crops(Tiling.single(6, 6), 3)
    sizes = crops.bincount()
    assert sorted(sizes.tolist()) == [9, 9, 18]
    kept = method.select(tokens, 16).kept
    assert torch.equal(crops[kept].bincount() * 36, sizes * 16)


def diverse_half():
    """Equal attention; the tokens of the left half are alike, those of the right half are not."""
    features = torch.ones(4, 8, 8)
    features[:, 4:] = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(6))
    return features.flatten(0, 1), torch.linspace(1.0, 1.001, 32)


@pytest.mark.parametrize(("official", "more"), [(False, True), (True, False)])
def test_holov_diversity_counts(official, more):
    """By default diverse crops keep more; in the official code the term cancels."""
    features, attention = diverse_half()
    method = (OfficialHoloV if official else holov.HoloV)(num_chunks=2, alpha=1.0)
    if official:  # its chunks are runs of tokens: let the halves be that
        features, attention = (
            t.view(4, 8, -1).transpose(0, 1).flatten(0, 1) for t in (features, attention)
        )
        tiling = Tiling.single(1, 32)
    else:
        tiling = Tiling.single(4, 8)
    tokens = given_signals(method, tiling, features, attention.flatten())
    kept = method.select(tokens, 8).kept
    right = (kept >= 16).sum() if official else (kept % 8 >= 4).sum()
    assert (right > 5) == more


def test_holov_overflow_goes_to_other_crops():
    """All attention in one crop of 4: the official code emits 8 vectors of zeros."""
    attention = torch.full((16,), 1e-6)
    attention[[0, 1, 4, 5]] = 1.0
    features = torch.randn(16, 4, generator=torch.Generator().manual_seed(7))
    tokens = [Tiling.single(4, 4), features, attention]
    method = method_class("holov")(num_chunks=4, alpha=0.0)
    order = method.select(given_signals(method, *tokens), 12).order.tolist()
    assert order[:4] == [0, 1, 4, 5]
    assert len(set(order)) == 12 and -1 not in order
    assert [sum(i in crop for i in order) for crop in ({2, 3, 6, 7}, {8, 9, 12, 13})] == [3, 3]
    official = OfficialHoloV(num_chunks=4, alpha=0.0)
    chosen = official.select(given_signals(official, *tokens), 12)
    assert chosen.count == 12
    assert chosen.order.tolist().count(-1) == 12 - len(chosen.kept) > 0


def test_holov_diversity_in_blocks(monkeypatch):
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(8))
    whole = holov._diversity(features)
    monkeypatch.setattr(holov, "_BLOCK", 7)
    torch.testing.assert_close(holov._diversity(features), whole)


@pytest.mark.parametrize(("keep", "number"), [(64, 16), (128, 8), (192, 5), (575, 1), (1, 576)])
def test_holov_number_of_crops(keep, number):
    assert method_class("holov")()._number(576, keep) == number
    assert method_class("holov")(num_chunks=7)._number(576, keep) == 7


def test_holov_crops_are_rectangles():
    crops = holov._crops(Tiling.single(24, 24), 16).view(24, 24)
    expected = torch.arange(16).view(4, 4).repeat_interleave(6, 0).repeat_interleave(6, 1)
    assert torch.equal(crops, expected)


@given(st.integers(1, 14), st.integers(1, 14), st.floats(0, 1))
def test_holov_crops_cover_the_image(rows, columns, share):
    number = max(1, round(share * rows * columns))
    crops = holov._crops(Tiling.single(rows, columns), number).view(rows, columns)
    assert crops.unique().tolist() == list(range(number))
    for crop in range(number):
        places = (crops == crop).nonzero()
        sides = places.amax(0) - places.amin(0) + 1
        assert sides.prod() == len(places)


def test_holov_crops_of_tiled_images():
    """Thumbnail and canvas have crops of their own, by their sizes."""
    crops = holov._crops(TILINGS["2 x 2"], 10)
    assert crops[:16].unique().tolist() == [0, 1]
    assert crops[16:].unique().tolist() == list(range(2, 10))


@pytest.mark.parametrize(
    ("tower", "layer"), [("clip", 22), ("siglip", 25), ("windowed", 31), ("merging", 31)]
)
def test_holov_layers(tower, layer):
    needs = method_class("holov")(scores="received").needs(shape_of(tower))
    assert needs == (Features(), ReceivedAttention(layer))
