"""Tokens of methods that merge, and their golden runner."""

import math

import numpy as np
import torch
from kit.golden import CLIP_L, Golden, assert_equal, choose
from torch import Tensor
from torch.nn.functional import cosine_similarity
from vlmprune.adapters.signals.draw import Sizes
from vlmprune.adapters.signals.table import SOURCES
from vlmprune.prune.contract import (
    Decoder,
    Method,
    ModelShape,
    Tower,
    VisualTokens,
)
from vlmprune.prune.tiling import Block, Tiling


def close(ours: Tensor, golden: Tensor) -> None:
    torch.testing.assert_close(ours, golden, rtol=1e-4, atol=1e-5)


def compare_prumerge(golden: Golden, method: Method) -> None:
    query, keys = golden.arrays["q_cls"], golden.arrays["keys"]
    kept = golden.arrays["kept"]
    attention = (keys @ query / math.sqrt(len(query))).softmax(0)[1:]
    close(attention, golden.arrays["cls_attn"])
    features = golden.arrays["features"]
    signals = dict(zip(method.needs(CLIP_L), (attention, keys[1:, None], features), strict=True))
    # A budget chooses the same number by the same rule only where no token is spaced.
    for keep in (None, len(kept) + 1) if method.name == "prumerge" else (None,):
        chosen = choose(method, signals, keep)
        assert chosen.order is not None
        assert chosen.features is not None
        assert_equal(chosen.order, torch.cat([kept, kept.new_tensor([-1])]))
        assert_equal(chosen.kept, kept.sort().values)
        close(chosen.features, golden.arrays["out_features"])


SHAPE = ModelShape(
    tower=Tower(num_layers=24, has_cls=True),
    decoder=Decoder(num_layers=32, hidden_size=8, intermediate_size=16),
)
SIZES = Sizes(width=5, encoder=5, head_width=3)
CPU = torch.device("cpu")
CANVAS = Tiling((Block((4,), (4,)), Block((2, 4), (4, 3), newline="rows")))
"""A thumbnail of 16 patches, and a canvas of four tiles: 8 + 6 + 16 + 12 patches, 6 newlines."""


def make(chooser, tiling: Tiling, *, seed: int = 0) -> VisualTokens:
    generator = torch.Generator().manual_seed(seed)
    signals = {}
    for signal in chooser.needs(SHAPE):
        count = len(tiling.tiles) if signal.per == "tile" else tiling.num_patches
        signals[signal] = SOURCES[type(signal)].draw(signal, count, SIZES, generator)
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


def outliers(weights: torch.Tensor) -> int:
    low, high = np.percentile(weights.numpy(), [25, 75])
    return int((weights.numpy() > high + 1.5 * (high - low)).sum())
