"""MustDrop: windows, their likeness, what is merged and in which order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kit.drawn import make_tokens
from kit.golden import Golden, Runner, assert_equal, choose
from torch.nn.functional import cosine_similarity
from vlmprune.prune.contract import EncoderFeatures, Method
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.ops.windows import of_size
from vlmprune.prune.registry import method_class
from vlmprune.prune.tiling import Tiling


def _mustdrop(golden: Golden, method: Method) -> None:
    arrays, params = golden.arrays, golden.params
    patches = arrays["hidden"][1:]
    keep = params["n_out"] if params["retained_tokens"] else None
    tiling = Tiling.single(*params["grid"])
    chosen = choose(method, {EncoderFeatures(): patches}, keep, tiling=tiling)
    assert_equal(chosen.kept, arrays["kept"])
    torch.testing.assert_close(chosen.features, arrays["out_features"], rtol=1e-4, atol=1e-5)
    sizes = chosen.groups[0].bincount(minlength=chosen.count)
    assert_equal(sizes, arrays["sizes"].to(sizes.dtype))


GOLDEN = {
    "mustdrop": Runner(
        "mustdrop",
        lambda p: {"window": tuple(p["window"]), "threshold": p["threshold"]},
        _mustdrop,
    ),
}


def test_windows_at_the_ends_are_smaller():
    assert of_size((3, 3), (2, 2)) == (
        (0, 1, 3, 4),
        (-1, -1, 2, 5),
        (-1, -1, 6, 7),
        (-1, -1, -1, 8),
    )


def test_by_hand():
    """The right window's two tokens are one direction, the left one's are at right angles."""
    features = torch.tensor([[1.0, 0], [0, 2], [1, 1], [3, 3]])
    tiling = Tiling.single(1, 4)
    method = method_class("mustdrop")(window=(1, 2))
    chosen = choose(method, {EncoderFeatures(): features}, 3, tiling=tiling)
    assert chosen.kept.tolist() == [0, 1, 3]
    assert chosen.order.tolist() == [3, 0, 1]  # the merged row comes first
    assert chosen.features.tolist() == [[2, 2], [1, 0], [0, 2]]
    assert chosen.groups.tolist() == [[0, 0, 1, 2], [2, 3, 0, 1]]
    both = choose(method, {EncoderFeatures(): features}, 2, tiling=tiling)
    assert both.order.tolist() == [3, 1] and both.features[1].tolist() == [0.5, 1]
    # Windows of 2 x 3 have room for one row.
    one = choose(method, {EncoderFeatures(): features}, 1, tiling=tiling)
    assert one.order.tolist() == [3] and one.features.tolist() == [[1.25, 1.5]]


def test_without_a_budget_windows_merge_from_the_threshold_on():
    features = {EncoderFeatures(): torch.tensor([[1.0, 0], [0, 2], [1, 1], [3, 3]])}
    for threshold, order in ((0.5, [3, 0, 1]), (0.0, [3, 1])):
        method = method_class("mustdrop")(window=(1, 2), threshold=threshold)
        chosen = choose(method, features, None, tiling=Tiling.single(1, 4))
        assert chosen.order.tolist() == order


@given(
    grid=st.tuples(st.integers(1, 9), st.integers(2, 9)),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
@settings(deadline=None, max_examples=60)
def test_a_plain_reading(grid, share, seed):
    method = method_class("mustdrop")()
    tokens = make_tokens(method, grid, seed=seed)
    total, features = tokens.num_tokens, tokens.signals[EncoderFeatures()]
    keep = min(total - 1, max(1, round(share * total)))
    windows = [[i for i in w if i >= 0] for w in of_size(grid, method._window(grid, keep))]

    def likeness(window) -> float:
        if len(window) < 2:
            return -torch.inf
        pairs = [(i, j) for i in window for j in window if i != j]
        rows = (features[list(side)].double() for side in zip(*pairs, strict=True))
        return float(cosine_similarity(*rows, dim=-1).mean())

    merged, left = [], total - keep
    for window in sorted(windows, key=likeness, reverse=True):
        if left:
            gone = window[:-1][:left]
            merged.append([*gone, window[-1]])
            left -= len(gone)
    touched = {i for members in merged for i in members}
    bags = [*merged, *([i] for i in range(total) if i not in touched)]
    bags = [bag for bag in bags if bag]
    chosen = method.select(tokens, keep)
    assert chosen.order.tolist() == [bag[-1] for bag in bags]
    wanted = torch.stack([features[bag].mean(0) for bag in bags])
    torch.testing.assert_close(chosen.features, wanted)


@pytest.mark.parametrize("wrong", [(1, 1), (3,), 3, [3, 3], (0, 3), (True, 3)])
def test_wrong_windows_are_refused(wrong):
    with pytest.raises(MethodFieldError, match="window="):
        method_class("mustdrop")(window=wrong)
    with pytest.raises(MethodFieldError, match="threshold="):
        method_class("mustdrop")(threshold=1.5)
