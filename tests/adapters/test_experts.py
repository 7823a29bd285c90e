"""Decoders with experts: what is read of them, and how wide their MLPs are."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import vlmprune
from kit import zoo
from vlmprune.adapters.registry import family_of

CASE = zoo.CASES["qwen3_vl_moe"]


def with_a_dense_layer(layer: int) -> zoo.Case:
    def config():
        made = copy.deepcopy(CASE.config())
        made.text_config.mlp_only_layers = [layer]
        return made

    return replace(CASE, name=f"{CASE.name}-dense-{layer}", config=config)


def test_neurons_of_experts_are_refused_layer_by_layer():
    with pytest.raises(vlmprune.MissingSignalError, match=r"experts of its own.*fastv") as refused:
        vlmprune.patch(CASE.model(), "corematching")
    assert "layers that do not" not in str(refused.value)
    case = with_a_dense_layer(2)
    with pytest.raises(vlmprune.MissingSignalError, match=r"layer 1,.*layers that do not: 2"):
        vlmprune.patch(case.model(), "corematching", layer=1)
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    with torch.no_grad(), vlmprune.patch(model, "corematching", layer=2, keep_tokens=5) as handle:
        model(**inputs)
        assert handle.last.tokens_kept == [5] * 3


def test_a_width_is_that_of_the_active_experts():
    decoder = family_of(CASE.model()).shape.decoder
    assert decoder.intermediate_size == 2 * 24
    assert decoder == CASE.shape.decoder


def test_a_width_that_the_configuration_does_not_give_is_not_read():
    """Published Qwen3.5-MoE has experts in all layers, and no MLP beside them."""
    model = zoo.CASES["qwen3_5_moe"].model()
    assert not hasattr(model.config.get_text_config(), "intermediate_size")
    assert family_of(model).shape.decoder.intermediate_size == 2 * 24 + 16  # one for all tokens
