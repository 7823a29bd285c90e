"""What every method's selection must hold, whatever it is given."""

import itertools
import math
from contextlib import suppress
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.drawn import (
    CHOICES,
    NAMES,
    SHAPE,
    TILINGS,
    TOWERS,
    at,
    make_tokens,
    same,
    shape_of,
)
from kit.entries import COMPRESSING
from vlmprune.prune.budget import plan, round_tokens
from vlmprune.prune.contract import (
    BeforeLLM,
    ClsAttention,
    Compressing,
    LayerSignal,
    ModelShape,
    Place,
    Pruning,
    ReceivedAttention,
    Selection,
    VisualTokens,
)
from vlmprune.prune.declared import readable
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.layers import scale_layer
from vlmprune.prune.ops.topk import top_k
from vlmprune.prune.registry import method, method_class, method_names
from vlmprune.prune.select import most, select_all
from vlmprune.prune.select import select as select_image
from vlmprune.prune.tiling import Tiling

ON_CACHE = [n for n in method_names() if not issubclass(method_class(n), Pruning)]
"""What these choose is tested in methods/test_compressing."""


LATE = [
    (name, cut.layer)
    for name in NAMES
    for cut in method_class(name)().cuts(SHAPE)
    if cut.adaptive and cut.layer
]
"""Cuts at which the tensors say how many stay, under a budget too."""
STAGED = [name for name in NAMES if method_class(name)().cuts(SHAPE)[-1].layer]
"""Methods that act in the decoder, some of them before it too."""
DEPTHS = (4, 5, 24, 28, 32, 40, 80)
RANKING = ["cls_topk", "divprune", "hiprune", "vtc_cls"] + [
    choice
    for choice in CHOICES
    if "@" in choice and not choice.startswith(("sparsevlm@", "random_decoder@"))
]
"""Methods that keep the first tokens where all tokens are alike."""
GRIDS = [(1, 2), (1, 7), (9, 1), (2, 3), (5, 4), (12, 12), (7, 30)]


def counts(num_tokens: int) -> list[int]:
    odd = num_tokens // 2 | 1
    return sorted({k for k in (1, 2, odd, num_tokens - 1) if 1 <= k < num_tokens})


def check(selection: Selection, tokens: VisualTokens, keep: int | None) -> None:
    """Well formed, and of the right count."""
    kept, order, num_tokens = selection.kept, selection.order, tokens.num_tokens
    assert keep is None or selection.count == keep
    assert kept.dtype == torch.int64 and kept.dim() == 1
    assert kept.tolist() == sorted(set(kept.tolist())), "ascending and unique"
    assert set(kept.tolist()) <= set(range(num_tokens))
    own = kept
    if order is not None:
        assert order.dtype == torch.int64
        own = order[order >= 0]
        assert sorted(own.tolist()) == kept.tolist()
        assert set(order[order < 0].tolist()) <= {-1}
    rows = range(selection.count)
    if selection.rows is not None:
        assert selection.features is not None
        assert len(set(selection.rows.tolist())) == len(selection.rows)
        assert set(selection.rows.tolist()) <= set(rows)
        rows = selection.rows.tolist()
    if selection.features is not None:
        width = 16 if selection.projected else 12
        assert selection.features.shape == (len(rows), width)
        assert torch.isfinite(selection.features).all()
    if order is not None and (order < 0).any():  # what stands for no token brings its features
        assert set((order < 0).nonzero()[:, 0].tolist()) <= set(rows)
    if selection.groups is not None:
        row, member = selection.groups.tolist()
        assert row == sorted(row)
        assert set(row) <= set(rows), "a row was merged, and has its own features"
        given = range(num_tokens) if tokens.layer else tokens.tiling.patches(kept.device).tolist()
        assert set(member) <= set(given)
        assert len(set(zip(row, member, strict=True))) == len(row)


# --- Every method ----------------------------------------------------------------------------


@pytest.mark.parametrize("choice", CHOICES)
def test_selection_is_exact(choice):
    method, layer = at(choice)
    for tower, grid in itertools.product(TOWERS, GRIDS):
        tokens = make_tokens(method, grid, layer=layer, tower=tower)
        for keep in counts(tokens.num_tokens):
            check(method.select(tokens, keep), tokens, keep)


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(method_class(n), BeforeLLM)])
@pytest.mark.parametrize("tiling", TILINGS.values(), ids=TILINGS)
def test_selection_is_exact_on_tiles_with_newlines(name, tiling):
    cls = method_class(name)
    for newlines, scope in itertools.product(cls.newline_policies, cls.scopes):
        if (newlines, scope) == ("compete", "tile"):
            continue
        method = cls(newlines=newlines, scope=scope)
        tokens = make_tokens(method, tiling)
        line = set(tiling.newlines(torch.device("cpu")).tolist())
        for keep in [*counts(tiling.num_tokens), tiling.num_patches]:
            if newlines == "keep" and keep <= len(line):
                with pytest.raises(BudgetError, match=f"keep_tokens={len(line) + 1}"):
                    select_image(method, tokens, keep)
                continue
            selection = select_image(method, tokens, keep)
            check(selection, tokens, keep)
            kept = line & set(selection.kept.tolist())
            spare = max(0, keep - tiling.num_patches)
            if newlines != "compete":
                assert len(kept) == (len(line) if newlines == "keep" else spare)


@pytest.mark.parametrize("name", STAGED)
@pytest.mark.parametrize("role", ["query", "context"])
@given(
    num_tokens=st.integers(2, 400),
    ratio=st.none() | st.floats(0.01, 1),
    depth=st.sampled_from(DEPTHS),
    seed=st.integers(0, 2**31),
)
def test_a_schedule_from_its_first_cut_to_the_last(name, role, num_tokens, ratio, depth, seed):
    """On every depth, each cut finds its signals and keeps what was planned, fewer than before; the
    last one what the budget says, or without one what the paper does."""
    cls = method_class(name)
    if (ratio is None and cls.needs_budget) or (ratio is not None and cls.unbudgeted):
        return
    call = method(name, keep_ratio=ratio)
    alive, last = num_tokens, num_tokens
    for stage in plan(num_tokens, [call], shape_of("clip", depth), role):
        tokens = make_tokens(call.method, (1, alive), layer=stage.layer, seed=seed, depth=depth)
        keep = None if stage.adaptive else stage.keep
        chosen = select_image(call.method, tokens, keep)
        check(chosen, tokens, keep)
        assert chosen.count <= alive if stage.adaptive else stage.keep < alive
        alive = chosen.count
        if call.adaptive or not stage.adaptive:
            last = alive
        if not alive:
            break
    wanted = call.method.most(num_tokens) if ratio is None else round_tokens(ratio, num_tokens)
    assert last <= wanted if call.adaptive else last == wanted


@pytest.mark.parametrize(("name", "layer"), LATE)
@given(
    num_tokens=st.integers(1, 200),
    scale=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_adaptive_cuts_are_well_formed_and_pure(name, layer, num_tokens, scale, seed):
    tokens = make_tokens(method_class(name)(), (1, num_tokens), layer=layer, seed=seed)
    signals = {signal: scale / num_tokens * values for signal, values in tokens.signals.items()}
    tokens = replace(tokens, signals=signals)
    before = {signal: values.clone() for signal, values in signals.items()}
    chosen = select_image(method_class(name)(), tokens, None)
    check(chosen, tokens, None)
    assert same(select_image(method_class(name)(), tokens, None), chosen)
    assert all(torch.equal(values, before[signal]) for signal, values in signals.items())


@pytest.mark.parametrize("num_tokens", [1, 7, 100])
@pytest.mark.parametrize(("share", "stays"), [(0.0, False), (0.09, False), (0.11, True), (1, True)])
def test_todre_late_is_all_or_nothing(num_tokens, share, stays):
    """However the text's attention is spread over an image's tokens."""
    ((_, layer),) = [late for late in LATE if late[0] == "todre"]
    tokens = make_tokens(method_class("todre")(), (1, num_tokens), layer=layer)
    for weights in (torch.ones(num_tokens), torch.eye(num_tokens)[-1]):
        signals = {signal: share * weights / weights.sum() for signal in tokens.signals}
        given_tokens = replace(tokens, signals=signals)
        kept = select_image(method_class("todre")(), given_tokens, None).kept
        assert kept.tolist() == list(range(num_tokens if stays else 0))


@pytest.mark.parametrize("name", [n for n in NAMES if method_class(n).finds_count])
@pytest.mark.parametrize("tiling", [Tiling.single(7, 9), *TILINGS.values()])
def test_without_a_budget_no_more_than_the_method_declares(name, tiling):
    method = method_class(name)()
    layer = method.cuts(SHAPE)[0].layer
    for seed in range(5):
        tokens = make_tokens(method, tiling, layer=layer, seed=seed)
        selection = select_image(method, tokens, None)
        check(selection, tokens, None)
        assert 0 < selection.count <= most(method, tiling)


@pytest.mark.parametrize("choice", CHOICES)
@given(
    grid=st.tuples(st.integers(1, 20), st.integers(2, 20)),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_selection_is_exact_at_random_sizes(choice, grid, share, seed):
    method, layer = at(choice)
    tokens = make_tokens(method, grid, layer=layer, seed=seed)
    keep = min(tokens.num_tokens - 1, max(1, round(share * tokens.num_tokens)))
    check(method.select(tokens, keep), tokens, keep)


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("tiling", [Tiling.single(6, 5), TILINGS["2 x 2"]], ids=["plain", "tiles"])
def test_selection_is_pure(choice, constant, tiling):
    """Nothing given is written to, and the same is chosen again, whatever happened in between."""
    method, layer = at(choice)
    tokens = make_tokens(method, tiling, layer=layer, constant=constant)
    before = {signal: tensor.clone() for signal, tensor in tokens.signals.items()}
    versions = {signal: tensor._version for signal, tensor in tokens.signals.items()}
    global_state = torch.random.get_rng_state()
    first = select_image(method, tokens, 21)
    assert torch.equal(torch.random.get_rng_state(), global_state)
    for signal, tensor in tokens.signals.items():
        assert tensor._version == versions[signal]
        assert torch.equal(tensor, before[signal])
    torch.rand(3)
    assert same(select_image(at(choice)[0], tokens, 21), first)


@pytest.mark.parametrize("choice", RANKING)
def test_ties_go_to_the_lower_index(choice):
    method, layer = at(choice)
    for grid, keep in itertools.product([(4, 5), (1, 30), (24, 24)], (1, 2, 7, 19)):
        tokens = make_tokens(method, grid, layer=layer, constant=True)
        assert method.select(tokens, keep).kept.tolist() == list(range(keep)), grid


@pytest.mark.parametrize("choice", CHOICES)
def test_low_precision_signals_are_scored_in_float32(choice):
    """bfloat16 signals choose what the same numbers in float32 choose."""
    method, layer = at(choice)
    tokens = make_tokens(method, (10, 10), layer=layer)
    low = {s: t.bfloat16() if t.is_floating_point() else t for s, t in tokens.signals.items()}
    high = {s: t.float() if t.is_floating_point() else t for s, t in low.items()}
    for keep in (1, 31, 99):
        chosen = [method.select(replace(tokens, signals=s), keep) for s in (low, high)]
        assert torch.equal(chosen[0].kept, chosen[1].kept)
        if chosen[0].order is not None:
            assert torch.equal(chosen[0].order, chosen[1].order)


@pytest.mark.parametrize("name", NAMES)
def test_declarations_fit_the_model(name):
    for tower, depth in itertools.product(TOWERS, DEPTHS):
        check_declarations(name, shape_of(tower, depth))


def check_declarations(name: str, shape: ModelShape) -> None:
    method = method_class(name)()
    cuts = method.cuts(shape)
    assert [cut.depth for cut in cuts] == sorted({cut.depth for cut in cuts})
    assert tuple(dict.fromkeys(cut.place for cut in cuts)) == method.places
    assert cuts[-1].layer < shape.decoder.num_layers
    assert method.cuts(shape)[-1].share == 1
    needs = method.needs(shape)
    assert needs == method_class(name)().needs(shape), "equal declarations are equal"
    assert len(set(needs)) == len(needs)
    for signal in needs:
        if isinstance(signal, ClsAttention | ReceivedAttention):
            assert 0 <= signal.layer < shape.tower.num_layers
        if isinstance(signal, LayerSignal):
            assert signal.layer >= 0
        assert any(readable(signal, cut) for cut in cuts), "read behind the last cut"


@pytest.mark.parametrize("name", ON_CACHE)
def test_declarations_of_methods_on_the_cache(name):
    for depth in DEPTHS:
        method, shape = method_class(name)(), shape_of("no cls", depth)
        assert method.cuts(shape) == ()
        assert method.place is Place.CACHE and method.places == (Place.CACHE,)
        needs = method.needs(shape)
        assert needs == method_class(name)().needs(shape)
        assert len(set(needs)) == len(needs)
        assert all(isinstance(need, LayerSignal) and 0 <= need.layer < depth for need in needs)


def test_every_method_that_compresses_is_tested_for_exact_counts():
    """methods/test_compressing holds what this file holds of the others."""
    assert {name for name, _ in COMPRESSING} == {
        name for name in ON_CACHE if issubclass(method_class(name), Compressing)
    }


@pytest.mark.parametrize("name", method_names())
def test_the_fields_that_replace_cls_are_declared(name):
    """Of all fields, those with which a method that reads CLS works on an encoder without it."""
    cls, shape = method_class(name), shape_of("no cls")

    def reads_cls(**given: str) -> bool:
        return any(need.of_cls for need in cls(**given).needs(shape))

    found = {}
    for field in cls().fields() if reads_cls() else ():
        with suppress(MethodFieldError):
            if not reads_cls(**{field: "received"}):
                found[field] = "received"
    assert cls.without_cls == found


@pytest.mark.parametrize("name", method_names())
def test_a_method_is_a_plain_value(name):
    cls = method_class(name)
    assert cls() == cls()
    assert hash(cls()) == hash(cls())
    assert set(cls().fields()) == {field.name for field in fields(cls)}


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("random", "seed", 0.5),
        ("random", "seed", True),
        ("vtc_cls", "layer", 1.5),
        ("vtc_cls", "layer", "16"),
        ("hiprune", "alpha", -0.1),
        ("hiprune", "alpha", 1.1),
        ("hiprune", "alpha", math.nan),
        ("hiprune", "alpha", "0.1"),
        ("hiprune", "object_layer", True),
        ("hiprune", "deep_layer", 2.0),
        ("fastv", "layer", 0),
        ("fastv", "layer", None),
        ("fastv", "layer", 2.0),
    ],
)
def test_a_wrong_field_value_is_refused_at_once(name, field, value):
    with pytest.raises(MethodFieldError, match=f"{field}=") as caught:
        method_class(name)(**{field: value})
    assert "give " in str(caught.value)


# --- Layers of other depths ------------------------------------------------------------------


@given(st.integers(1, 100), st.integers(1, 100), st.integers(0, 99))
def test_published_layers_keep_their_relative_depth(depth, published_depth, published):
    published %= published_depth
    layer = scale_layer(published, depth_published=published_depth, depth=depth)
    if depth == published_depth:
        assert layer == published
    else:
        assert min(1, depth - 1) <= layer <= depth - 1
        nearest = published * depth / published_depth
        assert abs(layer - nearest) <= 0.5 or layer in (1, depth - 1)


# --- top_k -----------------------------------------------------------------------------------


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.integers(0, 40))
def test_top_k_breaks_ties_by_index(scores, k):
    k = min(k, len(scores))
    by_rule = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert top_k(torch.tensor(scores), k).tolist() == by_rule[:k]


def test_top_k_compares_in_float32():
    assert top_k(torch.tensor([1, 1 + 1e-12], dtype=torch.float64), 2).tolist() == [0, 1]


# --- Several images at once --------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NAMES if issubclass(method_class(n), BeforeLLM)])
def test_one_pass_for_all_images_chooses_what_one_pass_each_does(name):
    """Of equal and of different sizes, tiled and plain, with the counts that each one has."""
    method = method_class(name)()
    images, keeps = [], []
    for seed, tiling in enumerate([*TILINGS.values(), *TILINGS.values(), Tiling.single(6, 6)]):
        images.append(make_tokens(method, tiling, seed=seed))
        keeps.append(tiling.num_newlines + max(1, tiling.num_patches // 3))
    together = select_all(method, images, keeps)
    for found, tokens, keep in zip(together, images, keeps, strict=True):
        alone = select_image(method, tokens, keep)
        for word in ("kept", "order", "rows", "groups", "features"):
            one, other = getattr(found, word), getattr(alone, word)
            assert (one is None and other is None) or torch.equal(one, other), word
