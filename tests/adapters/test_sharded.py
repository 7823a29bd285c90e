"""Models whose layers are on two devices by turns: methods answer as they do on one. The devices
are those of `devices`, which refuse tensors of one another as accelerators do."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import zoo
from kit.devices import CPU, Devices, Elsewhere
from kit.spread import METHODS, ONE, ROWS, STEPS, TWO, spread, works_on
from vlmprune.adapters.devices import execution_device, input_device


def generate(model, inputs):
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)
    return out.to(CPU)[:, -STEPS:]


def test_tensors_of_two_devices_do_not_meet():
    with Devices():
        one, two = torch.ones(2, device=ONE), torch.ones(2, device=TWO)
        with pytest.raises(RuntimeError, match="same device"):
            one + two
        with pytest.raises(RuntimeError, match="same device"):
            one[torch.zeros(1, dtype=torch.long, device=TWO)]
        assert isinstance(one, Elsewhere) and (one + two.to(ONE)).device == ONE


@pytest.mark.parametrize(
    ("case", "away"),
    [
        pytest.param(zoo.CASES[name], away, id=f"{name}-{away}")
        for name in zoo.FAMILY_NAMES
        for away in ((0, 1) if name == "llava-clip-llama" else (1,))
    ],
)
def test_methods_follow_the_layers(case, away):
    """Every kind of reading on the first family, with either half away; on others one for each
    thing that a family's layers do on their own: positions, deepstack, windows."""
    first = case.name == zoo.FAMILY_NAMES[0]
    kinds = METHODS if first else ("merging", "next layer", "steps", "everywhere")
    model = case.model()
    inputs = case.inputs(ROWS)
    expected = {"dense": (generate(model, inputs), None)}
    for name in kinds:
        if works_on(case, METHODS[name]):
            with vlmprune.patch(model, METHODS[name]) as handle:
                expected[name] = generate(model, inputs), handle.last.kept
    with Devices():
        spread(model, away)
        layers = model.model.language_model.layers
        there = [execution_device(layer) for layer in layers]
        assert there == [TWO if i % 2 == away else ONE for i in range(len(layers))]
        assert input_device(model) == ONE
        inputs = {key: value.to(ONE) for key, value in inputs.items()}
        assert torch.equal(generate(model, inputs), expected.pop("dense")[0])
        for name, (tokens, kept) in expected.items():
            with vlmprune.patch(model, METHODS[name]) as handle:
                assert torch.equal(generate(model, inputs), tokens), name
                for one, other in zip(handle.last.kept, kept, strict=True):
                    assert torch.equal(one.to(CPU), other), name
