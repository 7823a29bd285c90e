"""VTW: nothing stays behind its layer, which a search finds; no budget says otherwise."""

import pytest
import torch
import vlmprune
from kit import zoo
from kit.decoder import average, entering, layers_of, stages
from kit.golden import Golden, Runner
from vlmprune.eval.measure.withdrawal import withdrawal_layer
from vlmprune.prune.contract import Method
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.methods.decoder.vtw import divergences, first_within
from vlmprune.prune.registry import method


def _vtw(golden: Golden, vtw: Method) -> None:
    """The divergences, the layer of the search, and what is left there."""
    arrays, params = golden.arrays, golden.params
    found = divergences(arrays["logits_full"], arrays["logits_withdrawn"])
    torch.testing.assert_close(found, arrays["kl"].mean(0), rtol=2e-3, atol=1e-6)
    layers = range(params["first"], params["num_layers"])
    assert first_within(layers, found, params["eta"]) == params["k"]
    depth, num_tokens = params["num_layers"], params["n_image"]
    left = entering(method("vtw", layer=params["k"]), num_tokens, depth)
    assert left == [num_tokens] * params["k"] + [0] * (depth - params["k"])


GOLDEN = {"vtw": Runner("vtw", lambda p: {"layer": p["k"]}, _vtw)}


def test_published_counts():
    assert stages(method("vtw"), 576) == [(15, 0)]
    assert stages(method("vtw"), 1) == [(15, 0)]
    assert average(method("vtw", layer=16), 576) == 288


def test_layers_on_other_depths():
    assert [layers_of("vtw", depth) for depth in (2, 4, 28, 32, 40)] == [[1], [2], [13], [15], [19]]
    assert layers_of("vtw", 28, layer=-1) == [27]
    with pytest.raises(MethodFieldError, match=r"layer=0 .* 1\.\.31"):
        layers_of("vtw", 32, layer=0)


@pytest.mark.parametrize("budget", [{"keep_ratio": 1.0}, {"average_tokens": 64}])
def test_budgets_are_refused(budget):
    with pytest.raises(BudgetError, match=r"vtw takes no budget .* layer=16"):
        method("vtw", **budget)


def test_the_search_finds_what_each_layer_costs():
    """On a model whose deeper layers do not look at its image any more."""
    case = zoo.CASES["llava-clip-llama"]
    model, samples = case.model(), [case.inputs(((3, "A", 2),)), case.inputs(((4, "C", 3),))]
    for layer in model.model.language_model.layers[2:]:
        layer.self_attn.o_proj.weight.data.zero_()
    assert withdrawal_layer(model, samples, eta=1e-9) == 2
    dense = torch.stack([model(**sample).logits[0, -1] for sample in samples])
    with vlmprune.patch(model, "vtw", layer=1):
        cut = torch.stack([model(**sample).logits[0, -1] for sample in samples])
    (lost,) = divergences(dense, cut[:, None]).tolist()
    assert lost > 1e-6 and withdrawal_layer(model, samples, eta=2 * lost) == 1
    with pytest.raises(MethodFieldError, match="nearest is layer=2"):
        withdrawal_layer(model, samples, eta=-1.0)
