"""What SparseVLM and SparseVLM+ hold alike: published counts, averages, layers, fields."""

import pytest
import torch
from kit.decoder import TILED, at_cut, average, model, stages
from kit.sparsevlm import V1, V2, merged_of, some
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.contract import Hidden, RotaryAffinity, TextAttention
from vlmprune.prune.errors import MethodFieldError, UnsupportedModelError
from vlmprune.prune.methods.decoder import sparsevlm
from vlmprune.prune.methods.decoder.sparsevlm import raters
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.select import select

both = pytest.mark.parametrize("name", [V1, V2])
PUBLISHED = {
    V1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    V2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}
"""Tokens kept at each cut, of 576; SparseVLM adds merged rows."""


@both
@pytest.mark.parametrize("keep", range(1, TILED.num_tokens))
def test_every_count_of_a_tiled_image(name, keep):
    tokens = at_cut(some(name, TILED.num_tokens), tiling=TILED, layer=3)
    assert select(method_class(name)(), tokens, keep).count == keep
    alive = torch.where(torch.arange(TILED.num_tokens) < 30, torch.arange(TILED.num_tokens), -1)
    tokens = at_cut(some(name, TILED.num_tokens, layer=7), layer=7, alive=alive, tiling=TILED)
    assert select(method_class(name)(), tokens, keep).count == keep


@both
def test_nothing_given_is_changed(name):
    signals = some(name, 60)
    before = {signal: value.clone() for signal, value in signals.items()}
    for keep in (1, 2, 9, 30, 59):
        method_class(name)().select(at_cut(signals, layer=3), keep)
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
            method_class(name)().select(at_cut(some(name, 60, constant=constant), layer=3), keep)
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
        assert method_class(name)().select(at_cut(signals, layer=3), 20).count == 20
        assert raters(torch.empty(9, 4), torch.empty(5, 4)).shape == (5,)


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
