"""HoloV: against its rule, crops, diversity, layers."""

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from kit.tiles import given_signals, make_tokens, shape_of
from kit.tilings import TILINGS
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from vlmprune.prune.contract import Features, Method, ReceivedAttention, Selection, VisualTokens
from vlmprune.prune.methods.before_llm import holov
from vlmprune.prune.methods.before_llm.holov import HoloV
from vlmprune.prune.ops.topk import ascending, top_k
from vlmprune.prune.registry import method_class
from vlmprune.prune.tiling import Tiling

_EPS = 1e-6  # of the official HoloV


@dataclass(frozen=True, kw_only=True)
class OfficialHoloV(HoloV):
    """Flat chunks, a diversity that cancels, -1 where a chunk is too small for its share."""

    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        features, attention = (tokens.signals[s].float() for s in self.needs(tokens.shape))
        number = self._number(tokens.num_tokens, keep)
        chunks = attention.tensor_split(number)
        weights = torch.stack(list(map(self._weight, features.tensor_split(number), chunks)))
        weights = weights / (weights.sum() + _EPS)
        counts = (weights * keep).floor().long()
        counts[top_k(weights, keep - int(counts.sum()))] += 1

        order, start = [], 0
        for chunk, count in zip(chunks, counts.tolist(), strict=True):
            whole = count >= len(chunk)
            order.append(start + (torch.arange(len(chunk)) if whole else top_k(chunk, count)))
            start += len(chunk)
        found = torch.cat(order)
        pads = found.new_full((keep - len(found),), -1)
        return Selection(kept=ascending(found), order=torch.cat([found, pads]))

    def _weight(self, features: Tensor, attention: Tensor) -> Tensor:
        if len(attention) < 2:
            return attention.mean()
        unit = normalize(features, dim=-1, eps=_EPS)
        similar = (unit @ unit.T).fill_diagonal_(0)  # to itself, too, in the variance
        others = len(similar) - 1
        spread = (similar - similar.sum(1, keepdim=True) / others).square().sum(1) / others
        scaled = 1000 * attention
        scale = scaled.abs().mean() / (spread.abs().mean() + _EPS)
        return (scaled + self.alpha * spread * scale).mean()


def _holov(golden: Golden, method: Method) -> None:
    values = golden.arrays["features"], golden.arrays["attn"]
    signals = dict(zip(method.needs(CLIP_L), values, strict=True))
    assert isinstance(next(iter(signals)), Features)
    chosen = choose(method, signals, golden.params["new_image_token_num"])
    assert chosen.order is not None
    pad = golden.params["pad_code"]
    order = chosen.order.where(chosen.order >= 0, pad)
    assert_equal(order, golden.arrays["kept"])
    assert_equal(chosen.kept, order[order != pad].sort().values)


GOLDEN = {
    "holov": Runner(
        "holov",
        lambda p: {"num_chunks": p["num_patches"], "alpha": p["alpha_llava"]},
        _holov,
        OfficialHoloV,
    ),
}


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
