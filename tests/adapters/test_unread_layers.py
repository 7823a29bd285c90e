"""The last layers of the vision encoder do not run where nobody reads them."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook
from kit.zoo import ALL, CASES, Case
from vlmprune.adapters.registry import family_of

LLAVA = "llava-clip-mistral"


def ran(model, call) -> list[int]:
    """Encoder layers whose attention ran during `call()`."""
    seen: set[int] = set()
    hooks = [
        module.register_forward_pre_hook(lambda *_, index=index: seen.add(index))
        for index, module in enumerate(family_of(model).vision_attention)
    ]
    try:
        with torch.no_grad():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return sorted(seen)


@ALL
def test_what_the_projector_reads_is_run_and_nothing_else(case: Case):
    model, inputs = case.model(), case.inputs()
    family = family_of(model)
    everything = list(range(len(family.vision_attention)))
    unread = len(family.unread_layers({}))
    if case.packed:
        assert unread == 0
    with torch.no_grad():
        dense = model(**inputs).logits
    with vlmprune.patch(model, "grid", keep_ratio=1.0):
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, dense)
        shorter = everything[: len(everything) - unread]
        assert ran(model, lambda: model(**inputs)) == shorter
        assert ran(model, lambda: model.generate(**inputs, max_new_tokens=2)) == shorter
        pixels = {"pixel_values": inputs["pixel_values"]}
        if family.name == "llava":  # asked directly, the encoder gives all it has
            assert ran(model, lambda: model.get_image_features(**pixels)) == everything
    assert ran(model, lambda: model(**inputs)) == everything


@pytest.mark.parametrize(
    ("layers", "count"), [(-1, 0), (-2, 1), (2, 3), ([-4, -2], 1), ([1, 5], 0)]
)
def test_unread_is_what_is_behind_the_deepest_layer_read(layers: int | list[int], count: int):
    model = CASES[LLAVA].model()
    family = family_of(model)
    assert len(family.unread_layers({"vision_feature_layer": layers})) == count


@pytest.mark.parametrize(("layer", "count"), [(-1, 5), (-2, 4)])
def test_the_call_says_what_is_read(layer: int, count: int):
    model, inputs = CASES[LLAVA].model(), CASES[LLAVA].inputs()
    with vlmprune.patch(model, "grid", keep_ratio=0.5):
        call = {**inputs, "vision_feature_layer": layer}
        assert ran(model, lambda: model(**call)) == list(range(count))


def test_a_signal_of_the_last_layer_is_read():
    case = CASES[LLAVA]
    model, inputs = case.model(), case.inputs()
    with vlmprune.patch(model, "cls_topk", layer=-1, keep_ratio=0.5):
        assert ran(model, lambda: model(**inputs)) == list(range(5))


def test_hidden_states_have_as_many_entries_as_without_a_patch():
    model, inputs, seen = CASES[LLAVA].model(), CASES[LLAVA].inputs(), []
    tower = family_of(model).vision_tower
    tower.register_forward_hook(lambda module, args, out: seen.append(out.hidden_states))
    with torch.no_grad():
        dense = model(**inputs, output_hidden_states=True)
        with vlmprune.patch(model, "grid", keep_ratio=1.0):
            pruned = model(**inputs, output_hidden_states=True)
    for one, other in zip(dense.hidden_states, pruned.hidden_states, strict=True):
        assert torch.equal(one, other)
    # Of the encoder's, some releases of transformers keep only those that are selected.
    read = [[state is not None for state in states] for states in seen]
    assert read[0] == read[1] and any(read[0])


def test_weights_of_unread_layers_that_are_offloaded_are_not_loaded(monkeypatch):
    model, inputs = CASES[LLAVA].model(), CASES[LLAVA].inputs()
    cpu_offload(model.model, execution_device=torch.device("cpu"))
    loaded, load = set(), AlignDevicesHook.pre_forward

    def loads(self, module, *args, **kwargs):
        loaded.add(module)
        return load(self, module, *args, **kwargs)

    monkeypatch.setattr(AlignDevicesHook, "pre_forward", loads)
    layers = family_of(model).vision_tower.encoder.layers
    with torch.no_grad():
        model(**inputs)
        assert loaded & set(layers[-1].modules())
        loaded.clear()
        with vlmprune.patch(model, "grid", keep_ratio=0.5):
            model(**inputs)
    assert loaded & set(layers[-2].modules()) and not loaded & set(layers[-1].modules())


def test_removed_without_a_trace():
    model = CASES[LLAVA].model()
    layers = family_of(model).vision_tower.encoder.layers
    before = [dict(layer.__dict__) for layer in layers]
    with vlmprune.patch(model, "grid", keep_ratio=0.5):
        assert "forward" in layers[-1].__dict__
    assert [dict(layer.__dict__) for layer in layers] == before
