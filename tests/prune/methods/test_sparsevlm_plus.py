"""SparseVLM+: the heads that are heard, distance divided out."""

import pytest
import torch
from kit.decoder import at_cut
from kit.golden import Golden, Runner, assert_equal, choose
from kit.sparsevlm import V2, compared_raters, cut_layers, some
from torch import Tensor
from vlmprune.prune.contract import Method, RotaryAffinity, TextAttention
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.methods.decoder.sparsevlm import raters
from vlmprune.prune.registry import method_class


def _affinity(golden: Golden, tokens: Tensor, rows: Tensor) -> Tensor:
    """Two vectors of ones turned to positions (N,) and (R,), multiplied: (N, R)."""
    width = golden.params["head_dim"]
    turns = golden.params["rope_base"] ** (-torch.arange(0, width, 2).double() / width)
    apart = (rows - tokens[:, None]).double()
    return (2 * (apart[..., None] * turns).cos().sum(-1) / width**0.5).float()


def _sparsevlm_plus(golden: Golden, method: Method) -> None:
    arrays, start = golden.arrays, golden.params["image_start"]
    behind = start + golden.params["n_image"]
    rows = behind + compared_raters(golden)
    text = torch.arange(behind, len(arrays["emb"]))
    assert method.positions == "original"
    alive = torch.arange(golden.params["n_image"])
    for stage, layer in enumerate(cut_layers(golden, method)):
        signals = {
            TextAttention(layer - 1, rows=raters, each=True): arrays[
                f"attn_raters_{stage}"
            ].permute(2, 0, 1),
            RotaryAffinity(layer - 1, rows=raters): _affinity(golden, start + alive, rows),
        }
        keep = min(golden.params["schedule"][stage], len(alive) - 1)
        chosen = choose(method, signals, keep, layer=layer, alive=alive)
        alive = alive[chosen.kept]
        assert_equal(alive, arrays[f"kept_{stage}"])
        positions = torch.cat([torch.arange(start), start + alive, text])
        assert_equal(positions, arrays[f"pos_{stage}"])
    assert_equal(alive, arrays["kept"])


GOLDEN = {
    "sparsevlm_plus": Runner(
        "sparsevlm_plus",
        lambda p: {"retain": p["retain"], "heads": p["heads_kept"]},
        _sparsevlm_plus,
    ),
}


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
        assert chosen.select(at_cut(plus_signals(attention), layer=3), 2).kept.tolist() == kept
    first = method_class(V2)(heads=1).select(at_cut(plus_signals(attention[:, 1:]), layer=3), 2)
    assert first.kept.tolist() == [2, 3]


def test_a_head_counts_by_its_sum_not_by_its_largest():
    attention = torch.tensor([[9, 0], [0, 6], [0, 5], [0.0, 4]])[:, :, None]
    chosen = method_class(V2)(heads=1)
    assert chosen.select(at_cut(plus_signals(attention), layer=3), 1).kept.tolist() == [1]


def test_the_only_head_is_heard():
    attention = torch.tensor([1.0, 3, 2])[:, None, None]
    tokens = at_cut(plus_signals(attention), layer=3)
    assert method_class(V2)().select(tokens, 1).kept.tolist() == [1]


def test_distance_is_divided_out_before_heads_are_ranked():
    """Divided, the heads have 1 + 4 and 2 + 2; as they are 4 + 2 and 8 + 1. A factor below zero
    turns the sign: of token 1 with -2, and with it the second head is ahead."""
    attention = torch.tensor([[4.0, 8.0], [2.0, 1.0]])[:, :, None]
    chosen = method_class(V2)(heads=1)
    near = plus_signals(attention, [[4.0], [0.5]])
    assert chosen.select(at_cut(near, layer=3), 1).kept.tolist() == [1]
    turned = plus_signals(attention, [[4.0], [-2.0]])
    assert chosen.select(at_cut(turned, layer=3), 1).kept.tolist() == [0]


def test_raters_count_alike():
    """Means over two rows 2, 2.5, 1; the factors are each row's own."""
    attention = torch.tensor([[[4.0, 0.0]], [[0.0, 5.0]], [[1.0, 1.0]]])
    one_head = method_class(V2)(heads=1)
    assert one_head.select(at_cut(plus_signals(attention), layer=3), 1).kept.tolist() == [1]
    affinity = [[1.0, 1.0], [1.0, 2.0], [1.0, 1.0]]
    tokens = at_cut(plus_signals(attention, affinity), layer=3)
    assert one_head.select(tokens, 1).kept.tolist() == [0]


def test_tokens_only():
    chosen = method_class(V2)().select(at_cut(some(V2, 50), layer=3), 20)
    assert chosen.count == len(chosen.kept) == 20
    assert chosen.order is None and chosen.features is None and chosen.groups is None


@pytest.mark.parametrize(
    ("of", "heard"), [(32, 14), (40, 18), (28, 12), (16, 7), (8, 4), (2, 1), (1, 1)]
)
def test_the_share_of_heads(of, heard):
    """Head h looks h more at the image, and at token h alone: those heard are the last ones."""
    attention = torch.ones(of + 1, of, 1)
    attention[range(of), range(of), 0] += torch.arange(of) + 1
    tokens = at_cut(plus_signals(attention), layer=3)
    kept = method_class(V2)().select(tokens, heard).kept
    assert kept.tolist() == list(range(of - heard, of))
    given = method_class(V2)(heads=heard).select(tokens, heard).kept
    assert given.tolist() == kept.tolist()
    one_more = method_class(V2)().select(tokens, min(of, heard + 1)).kept
    if heard < of:  # a head that is not heard has no favourite: the first of equal tokens
        assert 0 in one_more.tolist()


def test_more_heads_than_there_are():
    with pytest.raises(MethodFieldError, match=r"heads=5 .* has 4: give 1\.\.4"):
        method_class(V2)(heads=5).select(at_cut(some(V2, 9, heads=4), layer=3), 3)


@pytest.mark.parametrize("heads", [0, -1, 2.0, True, "14"])
def test_impossible_heads(heads):
    with pytest.raises(MethodFieldError, match="heads="):
        method_class(V2)(heads=heads)
