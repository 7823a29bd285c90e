"""One table of signals: every signal of the contract has a row, and each row can be drawn."""

import pytest
import torch
from vlmprune.adapters.signals.draw import Sizes
from vlmprune.adapters.signals.table import ENCODER_INPUT, ENCODER_OUTPUT, HOOKS, SOURCES, shown
from vlmprune.prune.contract import HeadRank, LayerSignal, ModuleStep, Neurons, TextAttention
from vlmprune.prune.declared import SIGNALS

EXAMPLES = {
    HeadRank: lambda: HeadRank(1, rounds=3),
    ModuleStep: lambda: ModuleStep(1, "mlp", lambda before, after: after[:, 0]),
    Neurons: lambda: Neurons(1, lambda visual, text: visual[:, 0]),
}


def example(kind):
    if kind in EXAMPLES:
        return EXAMPLES[kind]()
    return kind(1) if "layer" in kind.__dataclass_fields__ else kind()


def test_every_signal_has_a_row():
    assert set(SOURCES) == set(SIGNALS.values())


@pytest.mark.parametrize("kind", SOURCES, ids=lambda kind: kind.__name__)
def test_a_row_says_what_shows_the_signal_and_draws_one(kind):
    need = example(kind)
    if issubclass(kind, LayerSignal):
        assert shown(need) in HOOKS
    else:
        assert shown(need) in (*HOOKS, ENCODER_INPUT, ENCODER_OUTPUT)
    drawn = SOURCES[kind].draw(need, 7, Sizes(), torch.Generator().manual_seed(0))
    again = SOURCES[kind].draw(need, 7, Sizes(), torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again)
    if need.per == "token":
        assert len(drawn) == 7


def test_what_shows_a_signal_may_depend_on_its_fields():
    assert shown(TextAttention(2)) != shown(TextAttention(2, ahead=True))
    steps = [ModuleStep(1, module, lambda before, after: after) for module in ("attention", "mlp")]
    assert [shown(step) for step in steps] == ["attention", "mlp"]
