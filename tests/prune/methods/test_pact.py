"""PACT: what is clustered, centres, what is recovered; log(size) in attention."""

import pytest
import torch
import vlmprune
from kit import zoo
from kit.decoder import average, layers_of, stages
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from vlmprune.prune import scores
from vlmprune.prune.contract import GistAttention, Hidden, LayerKeys, Method
from vlmprune.prune.errors import MethodFieldError, UnsupportedModelError
from vlmprune.prune.methods.decoder.pact import covering, densest_first
from vlmprune.prune.registry import method, method_class
from vlmprune.prune.tiling import Tiling

LLAVA = zoo.CASES["llava-clip-llama"]


def _pact(golden: Golden, pact: Method) -> None:
    arrays, params = golden.arrays, golden.params
    start, count, layer = params["image_start"], params["n_image"], params["layer"]
    end = start + count
    gist = scores.gist_attention(
        arrays["q"][:, :end], arrays["k"][:, :end], params["head_dim"] ** -0.5
    )
    signals = {
        GistAttention(layer): gist[start:],
        LayerKeys(layer, ahead=True): arrays["k_rot"][:, start:end].transpose(0, 1),
        Hidden(layer): arrays["hidden"][start:end],
    }
    tiling = Tiling.single(1, count)
    chosen = choose(pact, signals, None, shape=CLIP_L, layer=layer, tiling=tiling)
    assert pact.most(count) == params["n_first"] == len(arrays["first_kept"])
    assert_equal(chosen.kept, arrays["kept"])
    row, member = chosen.groups
    assert_equal(row.bincount(), arrays["sizes"])
    owner = torch.full((count,), -1).index_copy(0, member, chosen.kept[row])
    assert_equal(owner, arrays["assign"])
    torch.testing.assert_close(chosen.features, arrays["out_features"], rtol=1e-4, atol=1e-5)


GOLDEN = {
    "pact": Runner(
        "pact",
        lambda p: {
            "layer": p["layer"],
            "share": p["keep_share"],
            "cutoff": p["cutoff"],
            "recover": p["coef_pruned"],
        },
        _pact,
    ),
}


def signals_of(made: Method, count: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((count,), (count, 2, 4), (count, 6))
    drawn = (torch.rand(*size, generator=generator) for size in sizes)
    return dict(zip(made.needs(CLIP_L), drawn, strict=True))


def test_counts_and_layers():
    assert stages(method("pact", keep_tokens=64), 576, 28) == [(4, 64)]
    assert average(method("pact", average_tokens=128), 576, 28) == pytest.approx(128, abs=1)
    assert layers_of("pact", 28) == [4] and layers_of("pact", 32, layer=-1) == [31]
    with pytest.raises(MethodFieldError, match="layer=0"):
        layers_of("pact", 32, layer=0)


@pytest.mark.parametrize("keep", [1, 5, 40, 63])
def test_a_budget_is_a_number_of_centres(keep):
    made = method_class("pact")(layer=1)
    chosen = choose(made, signals_of(made, 64), keep, layer=1)
    assert chosen.count == keep and len(chosen.groups[0].unique()) == keep
    assert torch.isin(chosen.kept, chosen.groups[1]).all()


def test_centres_are_found_as_one_by_one():
    """By descending density each that no centre is near; the rule as it is written."""
    points = torch.rand(60, 3, generator=torch.Generator().manual_seed(1))
    apart = torch.cdist(points, points)
    place, found = densest_first(apart), []
    for number in place.argsort().tolist():
        if not any(apart[number, centre] <= 0.4 for centre in found):
            found.append(number)
    assert covering(apart, place, 0.4).nonzero()[:, 0].tolist() == sorted(found)
    assert 1 < len(found) < 60


def test_without_recovery_losers_leave():
    made = method_class("pact")(layer=1, share=0.25, recover=0.0)
    chosen = choose(made, signals_of(made, 64), None, layer=1)
    first = chosen.scores.topk(16).indices.sort().values
    assert_equal(chosen.groups[1].sort().values, first)


def test_attention_that_takes_no_numbers_is_refused():
    model = LLAVA.model()
    model.model.language_model.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(UnsupportedModelError, match=r"pact .*set_attn_implementation\(.sdpa"):
        vlmprune.patch(model, "pact", keep_ratio=0.5)


def test_it_does_not_go_with_a_method_on_the_cache():
    two = [vlmprune.method(n, keep_ratio=r) for n, r in (("pact", 0.5), ("visual_press", 0.2))]
    with pytest.raises(MethodFieldError, match=r"pact .* visual_press"):
        vlmprune.patch(LLAVA.model(), two)
