"""What methods that merge tokens hold: exact counts, ties, precision, fields."""

from dataclasses import replace

import pytest
import torch
from kit.merging import CANVAS, CPU, SHAPE, check, make, same
from vlmprune.prune.contract import (
    ClsAttention,
    ClsAttentionOneHead,
    ClsFeatures,
    EncoderFeatures,
    Keys,
    ReceivedAttention,
    Tower,
)
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import select
from vlmprune.prune.tiling import Tiling

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
