"""The choice stands on torch alone: what a serving engine calls gives what a patched model gets."""

import subprocess
import sys

import pytest
import torch
import vlmprune
from kit import zoo
from vlmprune.prune.choose import choose_images
from vlmprune.prune.contract import Decoder, Features, ModelShape, Tower
from vlmprune.prune.errors import BudgetError
from vlmprune.prune.tiling import Tiling

SHAPE = ModelShape(
    tower=Tower(num_layers=4, has_cls=True),
    decoder=Decoder(num_layers=4, hidden_size=8, intermediate_size=16),
)


def test_nothing_of_transformers_is_loaded():
    """Nor Triton, where a choice is made on a CPU."""
    code = "import sys, torch\n"
    for module in ("registry", "scores", "select", "choose"):
        code += f"import vlmprune.prune.{module}\n"
    code += "from vlmprune.prune.ops.maxmin import greedy_max_min\n"
    code += "greedy_max_min(torch.eye(4), 2)\n"
    code += "unwanted = ('transformers', 'vlmprune.adapters', 'triton')\n"
    code += "print([m for m in unwanted if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_counts_slots_and_emitted_rows():
    call = vlmprune.method("divprune", keep_tokens=3)
    tilings = [Tiling.single(3, 3), Tiling.single(1, 2)]
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(t.num_tokens, 8, generator=generator) for t in tilings]
    signals = [{Features(): rows} for rows in features]
    first, second = choose_images(SHAPE, tilings, signals, [(call,)] * 2, torch.device("cpu"))
    assert len(first.slots) == 3
    assert torch.equal(first.slots, first.selection.kept)
    assert [stage.keep for stage in first.plan] == [3]
    assert second.plan == ()  # as many as there are: all of them, untouched
    assert second.slots.tolist() == [0, 1]
    assert first.emit(features[0], None) is features[0]


def test_budgets_out_of_reach_are_refused():
    call = vlmprune.method("fastv", average_tokens=1)
    with pytest.raises(BudgetError, match="cannot be reached"):
        choose_images(SHAPE, [Tiling.single(9, 9)], [{}], [(call,)], torch.device("cpu"))


@zoo.BOTH_FAMILIES
def test_a_patched_model_keeps_what_is_chosen_here(case):
    model = case.model()
    inputs = case.inputs(((2, "A", 3),))
    pixels = {name: value for name, value in inputs.items() if name.startswith(("pixel", "image"))}
    with torch.no_grad():
        features = model.base_model.get_image_features(**pixels).pooler_output
        handle = vlmprune.patch(model, "divprune", keep_tokens=2)
        model(**inputs)
    last = handle.last
    call = vlmprune.method("divprune", keep_tokens=2)
    chosen = choose_images(
        SHAPE, last.tilings, [{Features(): features[0]}], [(call,)], torch.device("cpu")
    )
    assert chosen[0].slots.tolist() == last.kept[0].tolist()
