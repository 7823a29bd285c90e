"""CoreMatching, SpAtten, and what ToDRE and CATP do in the decoder: rules by hand, exact counts."""

import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.golden_corematching import shared_with_question
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.budget import plan, tokens_per_layer
from vlmprune.prune.contract import (
    ClsAttention,
    Decoder,
    Features,
    Hidden,
    LayerSignal,
    MeanHidden,
    ModelShape,
    Neurons,
    PixelSeed,
    Place,
    ReceivedInLayer,
    Selection,
    Signal,
    TextAttention,
    TextEmbeddings,
    Tower,
    VisualTokens,
)
from vlmprune.prune.errors import BudgetError, MethodFieldError, UnsupportedModelError
from vlmprune.prune.methods.decoder import corematching
from vlmprune.prune.methods.decoder.corematching import Overlap
from vlmprune.prune.ops.elbow import elbow
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import most, select
from vlmprune.prune.tiling import Block, Tiling

DEPTHS = (4, 5, 6, 24, 27, 28, 32, 36, 40, 48, 80)
TILED = Tiling((Block((3,), (3,)), Block((2, 3), (3, 2), "rows")))  # 9 + 25 patches, 5 newlines
SENTENCE = Overlap(0.5, 0.5, "sentence")
QUESTION = Overlap(0.5, 0.5, "question")
OFFICIAL = shared_with_question


def model(depth: int = 32) -> ModelShape:
    decoder = Decoder(num_layers=depth, hidden_size=4096, intermediate_size=11008)
    return ModelShape(tower=Tower(num_layers=24, has_cls=True), decoder=decoder)


def rand(seed: int, *size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def stages(call, num_tokens: int, depth: int = 32, images="query") -> list[tuple[int, int]]:
    return [(s.layer, s.keep) for s in plan(num_tokens, [call], model(depth), images)]


def layers_of(name: str, depth: int, **fields) -> list[int]:
    return [cut.layer for cut in method_class(name)(**fields).cuts(model(depth))]


def at_cut(
    signals: Mapping[Signal, Tensor], *, layer: int, depth: int = 32, tiling: Tiling | None = None
) -> VisualTokens:
    num_tokens = next(len(value) for key, value in signals.items() if key.per == "token")
    return VisualTokens(
        num_tokens=num_tokens,
        tiling=tiling or Tiling.single(1, num_tokens),
        shape=model(depth),
        signals=signals,
        alive=torch.arange(num_tokens),
        place=Place.DECODER if layer else Place.BEFORE_LLM,
        layer=layer,
    )


# --- corematching: neurons in common -----------------------------------------------------------


def overlaps_token_by_token(visual: Tensor, text: Tensor, rho: float, beta: float) -> list[int]:
    """The paper's rule on sets of neurons."""
    core = []
    for row in [*visual.tolist(), *text.tolist()]:
        positive = sorted(a for a in row if a > 0)
        least = positive[math.ceil(rho * (len(positive) - 1))] if positive else math.inf
        core.append({i for i, a in enumerate(row) if a >= least})
    width = visual.shape[1]
    frequency = [sum(i in of for of in core) for i in range(width)]
    ranked = sorted(range(width), key=lambda i: (-frequency[i], i))
    sentence = set(ranked[: max(1, round(beta * width))])
    return [len(of & sentence) for of in core[: len(visual)]]


@pytest.mark.parametrize("rho", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(1, 1, 5), (7, 3, 12), (64, 1, 20), (150, 70, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_overlaps_are_the_plain_ones(rho, sizes, dtype):
    """Whatever the number of tokens compared at once."""
    num_tokens, words, width = sizes
    visual, text = rand(1, num_tokens, width).to(dtype), rand(2, words, width).to(dtype)
    visual[0] = -1  # a token without any active neuron
    for beta in (0.0, 0.4, 1.0):
        read = Overlap(rho, beta, "sentence")(visual, text)
        assert read.dtype == torch.float32
        expected = overlaps_token_by_token(visual.float(), text.float(), rho, beta)
        assert read.tolist() == expected


def test_overlap_by_hand():
    """Core neurons are the larger half of the positive ones, the middle one among them.

    Token 0: 1 and 2 (of 0, 1, 2). Token 1: 3. Token 2: 1. Word: 0 and 1 (0 is the middle).
    Counts are 1, 3, 1, 1, so the sentence has neurons 1 and, of equal ones, 0.
    """
    visual = torch.tensor([[0.1, 0.5, 0.3, -1], [-1, -1, 0, 2], [-9, 0.1, -1, -1]])
    text = torch.tensor([[0.2, 0.4, 0.1, 0]])
    assert SENTENCE(visual, text).tolist() == [1, 0, 1]
    # all active ones: {0, 1, 2}, {3}, {1} with {0, 1, 2} of the word
    assert OFFICIAL(visual, text).tolist() == [3, 0, 1]
    # core neurons with all active ones of the word
    assert QUESTION(visual, text).tolist() == [2, 0, 1]


@pytest.mark.parametrize("words", [1, 2, 4, 5, 6, 20])
def test_which_question_token(words):
    """The last one; as released, the fifth from the end, or the first of fewer."""
    text = -torch.ones(words, 4)
    text[-1, :3] = 1
    visual = torch.ones(2, 4)
    assert QUESTION(visual, text).tolist() == [3, 3]
    text = -torch.ones(words, 4)
    text[max(0, words - 5), :2] = 1
    assert OFFICIAL(visual, text).tolist() == [2, 2]


def test_rho_and_beta_count():
    visual, text = rand(3, 40, 30), rand(4, 5, 30)
    reads = [Overlap(rho, beta, "sentence") for rho in (0, 0.6) for beta in (0.2, 0.7)]
    sums = [int(read(visual, text).sum()) for read in reads]
    assert sums[0] < sums[1] and sums[2] < sums[3]
    assert sums[0] > sums[2] and sums[1] > sums[3]


def test_reading_changes_nothing_and_takes_few_rows(monkeypatch):
    visual, text = rand(5, 70, 16), rand(6, 9, 16)
    for read in (SENTENCE, QUESTION, OFFICIAL):
        before = read(visual, text)
        assert visual._version == text._version == 0
        with monkeypatch.context() as patched:
            patched.setattr(corematching, "_ROWS", 7)
            assert torch.equal(read(visual, text), before)


def test_equal_declarations_are_equal():
    one, two = (method_class("corematching")(rho=0.3).needs(model()) for _ in range(2))
    assert one == two and hash(one) == hash(two)
    others = [{}, {"rho": 0.3, "beta": 0.5}, {"rho": 0.3, "reference": "question"}]
    for fields in others:
        assert method_class("corematching")(**fields).needs(model()) != one


# --- corematching: the elbow -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        # From (0, 10) to (4, 1); times 4 the distances are 0, 5, 10, 5, 0.
        ([10, 9, 3, 2, 1], 3),
        ([2, 10, 1, 3, 9], 3),  # in any order
        # From (0, 10) to (3, 1): 0, 6, 12, 0; above the chord counts as well.
        ([10, 9, 8, 1], 8),
        # From (0, 8) to (4, 0): 0, 4, 0, 4, 0; the first of equals, below or above.
        ([8, 5, 4, 3, 0], 5),
        ([5, 4, 3, 2], 5),  # all on the chord
        ([4, 4, 4], 4),
        ([7], 7),
    ],
)
def test_elbow_by_hand(values, expected):
    assert elbow(torch.tensor(values, dtype=torch.float32)).tolist() == [expected]


def chosen_of(overlaps: list[float], keep: int | None = None, **fields) -> list[int]:
    core = method_class("corematching")(**fields)
    (neurons,) = core.needs(model())
    tokens = at_cut({neurons: torch.tensor(overlaps).float()}, layer=neurons.layer + 1)
    return select(core, tokens, keep).kept.tolist()


def test_core_tokens_lie_above_the_elbow():
    assert chosen_of([2, 10, 1, 3, 9]) == [1, 4]
    assert chosen_of([2, 10, 1, 3, 3, 9, 3]) == [1, 5]  # its equals are out
    assert chosen_of([1, 9, 8, 10]) == [1, 3]


def test_a_token_stays_where_none_stands_out():
    assert chosen_of([4, 4, 4]) == [0]
    assert chosen_of([3, 5, 5, 4]) == [1]  # the elbow is the second of the largest
    assert chosen_of([2, 3, 4, 5]) == [3]  # all on the chord, whose first point is the elbow
    assert chosen_of([7]) == [0]


def test_a_budget_keeps_the_largest_overlaps():
    overlaps = [2, 5, 5, 1, 5, 3]
    picked = [chosen_of(overlaps, keep) for keep in range(1, 6)]
    assert picked == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 5], [0, 1, 2, 4, 5]]


@given(st.lists(st.integers(0, 12), min_size=1, max_size=40))
def test_core_tokens_are_some_and_at_most_the_declared(overlaps):
    kept = chosen_of(overlaps)
    core = method_class("corematching")()
    assert 1 <= len(kept) <= most(core, Tiling.single(1, len(overlaps)))
    worst, others = min(overlaps[i] for i in kept), set(range(len(overlaps))) - {*kept}
    if len(kept) > 1:
        assert all(overlaps[i] < worst for i in others)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 30])
def test_the_declared_most_can_be_reached(num_tokens):
    falling = [*range(100, 101 - num_tokens, -1), 0]
    assert len(chosen_of(falling)) == method_class("corematching")().most(num_tokens)


@pytest.mark.parametrize("depth", DEPTHS)
def test_corematching_reads_the_layer_before_its_cut(depth):
    core = method_class("corematching")()
    (cut,), (neurons,) = core.cuts(model(depth)), core.needs(model(depth))
    assert isinstance(neurons, Neurons) and cut.layer == neurons.layer + 1
    published = {32: 5, 28: 4, 40: 6, 4: 1, 6: 1, 80: 12}
    assert neurons.layer == published.get(depth, neurons.layer)
    assert 1 <= cut.layer < depth


def test_corematching_takes_a_layer():
    assert layers_of("corematching", 32, layer=0) == [1]
    assert layers_of("corematching", 6, layer=-2) == [5]
    for layer in (31, -1):
        with pytest.raises(MethodFieldError, match=r"last layer.*0\.\.30"):
            layers_of("corematching", 32, layer=layer)
    with pytest.raises(MethodFieldError, match="has 6"):
        layers_of("corematching", 6, layer=9)


@pytest.mark.parametrize("depth", [4, 6, 32])
def test_corematching_is_planned(depth):
    (cut,) = layers_of("corematching", depth)
    (stage,) = plan(100, [method("corematching")], model(depth))
    assert (stage.layer, stage.keep, stage.adaptive) == (cut, 100, True)
    assert stages(method("corematching", keep_ratio=0.3), 100, depth) == [(cut, 30)]
    (stage,) = plan(100, [method("corematching", keep_tokens=7)], model(depth))
    assert not stage.adaptive
    assert stages(method("corematching", keep_ratio=1.0), 100, depth) == []


# --- spatten -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "first"), [(4, 3), (5, 3), (6, 3), (23, 3), (24, 4), (32, 5), (40, 6), (80, 12)]
)
def test_spatten_cuts_every_layer_behind_the_first(depth, first):
    assert layers_of("spatten", depth) == list(range(first, depth))
    needs = method_class("spatten")().needs(model(depth))
    assert needs == tuple(ReceivedInLayer(layer) for layer in range(depth - 1))


def test_spatten_falls_linearly():
    assert stages(method("spatten", keep_tokens=10), 100, 6) == [(3, 70), (4, 40), (5, 10)]
    assert stages(method("spatten", keep_tokens=64), 576, 4) == [(3, 64)]
    # 27 cuts, 19 tokens each but for rounding: 512 / 27 = 18.96
    counts = [keep for _, keep in stages(method("spatten", keep_tokens=64), 576)]
    assert counts[:3] == [557, 538, 519] and counts[-2:] == [83, 64] and len(counts) == 27


@given(st.integers(1, 700), st.floats(0, 1, exclude_min=True), st.sampled_from(DEPTHS))
def test_spatten_ends_at_the_budget(num_tokens, ratio, depth):
    entering = tokens_per_layer(
        num_tokens, plan(num_tokens, [method("spatten", keep_ratio=ratio)], model(depth)), depth
    )
    keep = min(num_tokens, max(1, round(ratio * num_tokens)))
    assert entering[:3] == [num_tokens] * 3 and entering[-1] == keep
    first = layers_of("spatten", depth)[0]
    for layer in range(first, depth):
        part = (layer - first + 1) / (depth - first)
        assert abs(entering[layer] - (num_tokens + part * (keep - num_tokens))) <= 0.5 + 1e-9


def test_spatten_needs_a_budget_that_it_can_reach():
    with pytest.raises(BudgetError, match="spatten needs a budget"):
        method("spatten")
    call = method("spatten", average_tokens=400)
    entering = tokens_per_layer(576, plan(576, [call], model()), 32)
    assert sum(entering) / 32 == pytest.approx(400, abs=0.5)
    assert stages(method("spatten", keep_ratio=1.0), 576) == []


def test_spatten_sums_all_layers_so_far():
    """Token 1 is first in sum, 2 in the newest layer; 0 and 3 are equal."""
    spatten = method_class("spatten")()
    per_layer = [[0.0, 4, 0, 1], [1, 0, 1, 0], [0, 0, 2, 0]]
    signals: dict[Signal, Tensor] = {
        ReceivedInLayer(layer): torch.tensor(values) for layer, values in enumerate(per_layer)
    }
    tokens = at_cut(signals, layer=3, depth=6)
    picked = [spatten.select(tokens, keep).kept.tolist() for keep in (1, 2, 3)]
    assert picked == [[1], [1, 2], [0, 1, 2]]
    signals[ReceivedInLayer(3)] = torch.tensor([0.0, 0, 0, 9])
    assert spatten.select(at_cut(signals, layer=4, depth=6), 1).kept.tolist() == [3]


# --- todre, late -------------------------------------------------------------------------------


@pytest.mark.parametrize(("depth", "layer"), [(4, 3), (5, 4), (6, 5), (28, 24), (32, 28), (40, 35)])
def test_todre_cuts_behind_seven_eighths(depth, layer):
    todre = method_class("todre")()
    early, late = todre.cuts(model(depth))
    assert (early.layer, early.adaptive) == (0, False)
    assert (late.layer, late.adaptive, late.images) == (layer, True, "each")
    assert todre.needs(model(depth))[-1] == TextAttention(layer - 1, rows="text")


def test_todre_signals_of_the_encoder_come_first():
    shape = model()
    assert method_class("todre")().needs(shape)[:2] == (Features(), ClsAttention(23))
    seeded = method_class("todre")(pivot="random")
    assert seeded.needs(shape)[:2] == (Features(), PixelSeed())
    assert len(seeded.needs(shape)) == 3


@pytest.mark.parametrize(
    ("received", "tau", "stays"),
    [
        ([0.25, 0.125, 0.125], 0.5, True),  # not below
        ([0.25, 0.125, 0.0625], 0.5, False),
        ([0.04, 0.04, 0.03], 0.1, True),  # together, not each
        ([0.04, 0.03, 0.02], 0.1, False),
        ([0.0, 0.0], 0.0, True),
        ([0.5, 0.25], 1.0, False),
    ],
)
def test_todre_keeps_all_or_nothing(received, tau, stays):
    todre = method_class("todre")(tau=tau)
    tokens = at_cut({TextAttention(27, rows="text"): torch.tensor(received)}, layer=28)
    kept = select(todre, tokens, None).kept
    assert kept.dtype == torch.int64
    assert kept.tolist() == (list(range(len(received))) if stays else [])


@pytest.mark.parametrize("depth", [4, 6, 32])
def test_todre_as_published(depth):
    (_, late) = layers_of("todre", depth)
    early, adaptive = plan(2880, [method("todre")], model(depth))
    assert (early.layer, early.keep, early.adaptive) == (0, 720, False)
    assert (adaptive.layer, adaptive.keep, adaptive.adaptive) == (late, 720, True)
    assert stages(method("todre", keep_ratio=0.1), 2880, depth) == [(0, 288), (late, 288)]
    assert stages(method("todre", keep_ratio=0.1, late=False), 2880, depth) == [(0, 288)]
    assert stages(method("todre", late=False), 2880, depth) == [(0, 720)]
    assert not method("todre").adaptive


@pytest.mark.parametrize("words", [{"keep_ratio": 1.0}, {"keep_tokens": 576}, {"keep_tokens": 999}])
@pytest.mark.parametrize("name", ["todre", "catp", "spatten", "corematching"])
def test_full_budget_plans_nothing(name, words):
    for depth in (4, 6, 32):
        for images in ("query", "context"):
            assert stages(method(name, **words), 576, depth, images) == []


@pytest.mark.parametrize("num_tokens", [1, 2, 6, 10, 2880])
def test_a_quarter_is_rounded_as_ratios_are(num_tokens):
    published = method_class("todre")().most(num_tokens)
    assert published == (
        stages(method("todre", keep_ratio=0.25), num_tokens)[0][1] if num_tokens > 1 else 1
    )


def test_the_quarter_is_of_all_tokens_newlines_included():
    todre = method_class("todre")()
    assert most(todre, TILED) == stages(method("todre"), TILED.num_tokens)[0][1] == 10


# --- catp, late --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "layer"),
    [(4, 1), (5, 1), (6, 1), (24, 4), (27, 5), (28, 6), (32, 6), (36, 6), (40, 10), (80, 20)],
)
def test_catp_layers(depth, layer):
    catp = method_class("catp")()
    cuts = [(cut.layer, cut.images) for cut in catp.cuts(model(depth))]
    assert cuts == [(0, "each"), (layer + 1, "context"), (layer + 2, "query")]
    assert catp.needs(model(depth)) == (
        Features(),
        TextEmbeddings(),
        TextAttention(layer - 1),
        TextAttention(layer),
        Hidden(layer + 1),
        MeanHidden(layer + 1, "query"),
        Hidden(layer + 2),
        MeanHidden(layer + 2, "context"),
    )


def test_catp_takes_a_layer():
    assert layers_of("catp", 32, layer=1) == [0, 2, 3]
    assert layers_of("catp", 32, layer=29) == layers_of("catp", 32, layer=-3) == [0, 30, 31]
    for layer in (0, 30, -1):
        with pytest.raises(MethodFieldError, match=r"layer=.*1\.\.29"):
            layers_of("catp", 32, layer=layer)
    with pytest.raises(UnsupportedModelError, match="late=False"):
        layers_of("catp", 3)
    assert layers_of("catp", 3, late=False) == [0]


@pytest.mark.parametrize(("depth", "layer"), [(4, 1), (6, 1), (32, 6), (40, 10)])
def test_catp_cuts_half_of_it_before_the_llm(depth, layer):
    call = method("catp", keep_tokens=64)
    assert stages(call, 576, depth, "context") == [(0, 320), (layer + 1, 64)]
    assert stages(call, 576, depth, "query") == [(0, 320), (layer + 2, 64)]
    assert stages(method("catp", keep_tokens=64, late=False), 576, depth, "context") == [(0, 64)]


@given(st.integers(2, 700), st.integers(1, 700))
def test_catp_rounds_what_stays_down(num_tokens, keep):
    for images in ("context", "query"):
        counts = [
            count for _, count in stages(method("catp", keep_tokens=keep), num_tokens, 32, images)
        ]
        if keep >= num_tokens:
            assert counts == []
            continue
        half = math.floor(num_tokens * (1 - (1 - keep / num_tokens) / 2) + 1e-9)
        assert counts == ([half, keep] if half > keep else [keep])


def test_catp_counts_the_cost_of_the_query():
    call = method("catp", average_tokens=100)
    entering = tokens_per_layer(576, plan(576, [call], model()), 32)
    assert sum(entering) / 32 == pytest.approx(100, abs=0.7)


def context_signals(before, after, hidden, query, *, layer: int = 7) -> dict[Signal, Tensor]:
    return {
        TextAttention(layer - 2): torch.tensor(before),
        TextAttention(layer - 1): torch.tensor(after),
        Hidden(layer): torch.tensor(hidden),
        MeanHidden(layer, "query"): torch.tensor(query),
    }


def test_catp_context_by_hand():
    """Attention grows by 0.3, 0 (it falls), 0.1, 0; cosines are 0, 1, 0.8, -1, times 0.6."""
    before, after = [0.1, 0.9, 0.1, 0.2], [0.4, 0.1, 0.2, 0.2]
    hidden = [[0.0, 2.0], [3.0, 0.0], [4.0, 3.0], [-1.0, 0.0]]
    signals = context_signals(before, after, hidden, [5.0, 0.0])
    orders = {
        0.6: [1, 2, 0, 3],  # 0.3, 0.6, 0.58, -0.6
        0.4: [2, 1, 0, 3],  # 0.3, 0.4, 0.42, -0.4
        0.0: [0, 2, 1, 3],  # 0.3, 0, 0.1, 0: the lower of two
    }
    for similarity, order in orders.items():
        catp = method_class("catp")(similarity=similarity)
        for keep in (1, 2, 3):
            kept = select(catp, at_cut(signals, layer=7), keep).kept.tolist()
            assert kept == sorted(order[:keep]), (similarity, keep)


def test_catp_ranks_all_images_of_the_context_together():
    """Two images of three tokens follow one another; two tokens of the second one stay."""
    catp = method_class("catp")()
    after = [0.1, 0.0, 0.1, 0.5, 0.2, 0.4]
    signals = context_signals([0.0] * 6, after, [[1.0, 1.0]] * 6, [1.0, 0.0])
    assert select(catp, at_cut(signals, layer=7), 2).kept.tolist() == [3, 5]


def test_catp_query_by_hand():
    """Cosines with the context, whatever the lengths: 0.6, 0.8, 0 (a token of zeros), -1, 0.8."""
    hidden = torch.tensor([[6.0, 8], [4, 3], [0, 0], [-2, 0], [4, 3]])
    signals: dict[Signal, Tensor] = {
        Hidden(8): hidden,
        MeanHidden(8, "context"): torch.tensor([0.5, 0.0]),
    }
    order = [1, 4, 0, 2, 3]
    for keep in (1, 2, 3, 4):
        kept = select(method_class("catp")(), at_cut(signals, layer=8), keep).kept.tolist()
        assert kept == sorted(order[:keep])


# --- All of them -------------------------------------------------------------------------------

CUTS = [
    ("corematching", {}, 6),
    ("corematching", {"reference": "question"}, 6),
    ("spatten", {}, 5),
    ("spatten", {}, 31),
    ("catp", {}, 7),
    ("catp", {}, 8),
]


def in_decoder(name: str, fields: dict, layer: int, *, constant=False):
    """The method, and tokens at this cut with what it has seen by then."""
    method, num_tokens = method_class(name)(**fields), TILED.num_tokens
    signals: dict[Signal, Tensor] = {}
    for number, need in enumerate(method.needs(model())):
        if not isinstance(need, LayerSignal):
            continue
        entering = isinstance(need, Hidden | MeanHidden)
        if need.layer < layer or (need.layer == layer and entering):
            sizes = {Hidden: (num_tokens, 8), MeanHidden: (8,)}
            values = rand(number, *sizes.get(type(need), (num_tokens,)))
            signals[need] = torch.ones_like(values) if constant else values
    return method, at_cut(signals, layer=layer, tiling=TILED)


@pytest.mark.parametrize(("name", "fields", "layer"), CUTS)
def test_every_count_is_exact_and_ties_go_to_the_lower_index(name, fields, layer):
    for constant in (False, True):
        method, tokens = in_decoder(name, fields, layer, constant=constant)
        for keep in range(1, tokens.num_tokens + 1):
            kept = select(method, tokens, keep).kept.tolist()
            assert len(kept) == keep and kept == sorted(set(kept))
            if constant:
                assert kept == list(range(keep))


@pytest.mark.parametrize(("name", "fields", "layer"), CUTS)
def test_inputs_stay_and_results_repeat(name, fields, layer):
    method, tokens = in_decoder(name, fields, layer)
    before = {signal: value.clone() for signal, value in tokens.signals.items()}
    first, second = (method.select(tokens, 11) for _ in range(2))
    assert isinstance(first, Selection) and torch.equal(first.kept, second.kept)
    for signal, value in tokens.signals.items():
        assert value._version == 0 and torch.equal(value, before[signal])


@pytest.mark.parametrize(("name", "fields", "layer"), CUTS)
def test_nothing_waits_for_the_device(name, fields, layer):
    method, tokens = in_decoder(name, fields, layer)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        signals = {signal: mode.from_tensor(t) for signal, t in tokens.signals.items()}
        faked = at_cut(signals, layer=layer, tiling=TILED)
        assert method.select(faked, 9).count == 9


def test_hidden_states_are_compared_in_float32():
    for layer in (7, 8):
        catp, tokens = in_decoder("catp", {}, layer)
        low = {s: t.bfloat16() if isinstance(s, Hidden) else t for s, t in tokens.signals.items()}
        high = {s: t.float() for s, t in low.items()}
        kept = [catp.select(at_cut(s, layer=layer), 20).kept for s in (low, high)]
        assert torch.equal(*kept)


def test_places():
    both, before = (Place.BEFORE_LLM, Place.DECODER), (Place.BEFORE_LLM,)
    for name in ("todre", "catp"):
        cls = method_class(name)
        assert cls().places == both and cls(late=False).places == before
        assert cls.place is Place.BEFORE_LLM
        late = [s for s in cls(late=False).needs(model()) if isinstance(s, LayerSignal)]
        assert not late
    for name in ("corematching", "spatten"):
        assert method_class(name)().places == (Place.DECODER,)
        assert method_class(name).positions == "original"


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("corematching", {"rho": 1.5}),
        ("corematching", {"beta": math.nan}),
        ("corematching", {"reference": "word"}),
        ("corematching", {"layer": 2.0}),
        ("todre", {"tau": 1.2}),
        ("todre", {"late": "no"}),
        ("catp", {"late": 0}),
        ("catp", {"similarity": -0.1}),
        ("catp", {"similarity": math.inf}),
        ("catp", {"layer": "6"}),
    ],
)
def test_a_wrong_field_is_refused(name, fields):
    (field,) = fields
    with pytest.raises(MethodFieldError, match=f"{field}=") as caught:
        method_class(name)(**fields)
    assert "give " in str(caught.value) or "use " in str(caught.value)
