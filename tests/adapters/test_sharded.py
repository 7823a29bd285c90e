"""Models whose layers are on two devices by turns: methods answer as they do on one. The devices
are those of `devices`, which refuse tensors of one another as accelerators do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

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


def cells() -> Iterator[tuple[zoo.Case, int, list[str]]]:
    """Every kind of reading on the first family, with either half away by turns, and with both what
    acts in several layers; on others what acts everywhere, and one for each thing that a family's
    layers do on their own: positions, deepstack, windows."""
    for away in (0, 1):
        yield zoo.CASES[zoo.FAMILY_NAMES[0]], away, [*list(METHODS)[away:-1:2], "everywhere"]
    own = itertools.cycle(("merging", "next layer", "steps"))
    for name in zoo.FAMILY_NAMES[1:]:
        yield zoo.CASES[name], 1, [next(own), "everywhere"]


@pytest.mark.parametrize(
    ("case", "away", "kinds"),
    [pytest.param(*cell, id=f"{cell[0].name}-{cell[1]}") for cell in cells()],
)
def test_methods_follow_the_layers(case, away, kinds):
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
