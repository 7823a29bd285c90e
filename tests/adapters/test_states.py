"""Decoders in which few layers have attention: the others keep a state of fixed size."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import vlmprune
from kit import decoding, zoo
from kit.beside_oracle import check_generated, generated
from kit.decoder_kinds import stored_lengths
from kit.decoding import STEPS, call_of, logits_of
from kit.reported import TOLERANCE, cached_truth, truth_of
from vlmprune.adapters.cache_names import CACHE
from vlmprune.prune.contract import Decoder, ModelShape, Tower
from vlmprune.prune.registry import method_class

CASE = zoo.CASES["qwen3_5"]
PUBLISHED = ModelShape(
    tower=Tower(num_layers=27, has_cls=False, merge_unit=4),
    decoder=Decoder(
        num_layers=32,
        hidden_size=4096,
        intermediate_size=12288,
        attention_layers=tuple(range(3, 32, 4)),
    ),
)


def with_attention_in(*layers: int, depth: int = 4) -> zoo.Case:
    """The tiny model with attention in these layers."""

    def config():
        made = copy.deepcopy(CASE.config())
        kinds = ["full_attention" if n in layers else "linear_attention" for n in range(depth)]
        made.text_config.layer_types = kinds
        return made

    decoder = replace(CASE.shape.decoder, attention_layers=layers)
    name = f"{CASE.name}-{'-'.join(map(str, layers))}"
    return replace(CASE, name=name, config=config, shape=replace(CASE.shape, decoder=decoder))


def cuts(name: str, shape: ModelShape = PUBLISHED, **fields) -> list[int]:
    return [cut.layer for cut in method_class(name)(**fields).cuts(shape)]


def reads(name: str, shape: ModelShape = PUBLISHED, **fields) -> list[int]:
    needs = method_class(name)(**fields).needs(shape)
    return [need.layer for need in needs if getattr(need, "of_attention", False)]


def test_a_cut_is_behind_a_layer_with_attention():
    assert (cuts("fastv"), reads("fastv")) == ([4], [3])
    assert (cuts("fastv", layer=9), reads("fastv", layer=9)) == ([9], [7])
    assert (cuts("todre"), reads("todre", pivot="random")) == ([0, 28], [27])
    assert cuts("spatten") == [8, 12, 16, 20, 24, 28]
    assert reads("spatten") == [3, 7, 11, 15, 19, 23, 27]


def test_a_decoder_whose_last_layer_alone_has_attention_is_refused():
    with pytest.raises(vlmprune.UnsupportedModelError, match="before the LLM"):
        vlmprune.patch(with_attention_in(3).model(), "fastv", keep_ratio=0.5)


def test_the_report_says_where_it_cut_and_why():
    model = CASE.model()
    with torch.no_grad(), vlmprune.patch(model, "fastv", keep_tokens=5, layer=1) as handle:
        model(**CASE.inputs(zoo.BATCH))
        assert [stage.layer for stage in handle.last.stages] == [2]
        assert "reads attention of layers [1] and cuts at layers [2]" in handle.last.note
        assert handle.last.layers_read == {"fastv: TextAttention": [1]}


@pytest.mark.parametrize("layers", [(1, 3), (0,), (1,), (2,)])
@pytest.mark.parametrize("name", ["fastv", "todre", "spatten"])
def test_layers_with_attention_may_be_anywhere(name, layers):
    """Also none behind the cut, or none before one that is before the LLM."""
    case = with_attention_in(*layers)
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    fields = {"pivot": "received", "tau": 0.9} if name == "todre" else {}
    handle = vlmprune.patch(model, name, keep_ratio=0.4, **fields)
    out = generated(model, inputs)
    check_generated(truth_of(case, inputs, model, handle), out, inputs, handle)


LFM2 = zoo.CASES["lfm2_vl"]


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (LFM2, ["elastic_cache"]),  # which numbers anew what is stored
        (LFM2, ["token_select"]),
        (CASE, ["fastv", "elastic_cache"]),
        (with_attention_in(2), ["elastic_cache"]),
        (with_attention_in(0), ["divprune", "visual_press"]),
        (with_attention_in(1), ["fastv", "elastic_cache"]),  # states alone behind the cut
    ],
    ids=lambda given: given.name if isinstance(given, zoo.Case) else "-".join(given),
)
def test_methods_on_the_cache_shorten_layers_with_attention_alone(case, names):
    model, inputs = case.model(), case.inputs(zoo.BATCH)
    budgets = (0.4, 0.2)[: len(names)]
    calls = [call_of(name, keep_ratio=ratio) for name, ratio in zip(names, budgets, strict=True)]
    handle = vlmprune.patch(model, calls)
    out = decoding.generated(model, inputs)
    truth, stored = cached_truth(case, inputs, model, handle), []
    for row, tokens in enumerate(out.sequences[:, -STEPS:].tolist()):
        expected, layers = truth.cached.run(row, tokens[:-1])
        torch.testing.assert_close(logits_of(out)[:, row], expected, **TOLERANCE)
        stored.append([layer.stored for layer in layers])
    assert stored_lengths(out[CACHE]) == [max(layer) for layer in zip(*stored, strict=True)]
    attending = case.shape.decoder.attending
    for of_row in handle.last.cache_kept or ():
        assert all(not count for n, count in enumerate(of_row) if n not in attending)
    assert out[CACHE].get_seq_length() == inputs["input_ids"].shape[1] + STEPS - 1


@pytest.mark.parametrize("name", ["fastv", "divprune", "visual_press"])
def test_several_tokens_at_once_go_on_from_what_each_state_has_seen(name):
    model, rows = CASE.model(), (zoo.TWO, zoo.ONE)
    inputs = CASE.inputs(rows)
    handle = vlmprune.patch(model, name, keep_ratio=0.4)
    more = torch.tensor([[5, 6, 7], [4, 8, 9]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    with torch.no_grad():
        cache = {CACHE: model(**inputs, use_cache=True)[CACHE]}
        of_kind = cached_truth if name == "visual_press" else truth_of
        truth = of_kind(CASE, inputs, model, handle)
        truth.pieces = (more.shape[1],)
        found = model(input_ids=more, attention_mask=mask, **cache).logits
    for row, ids in enumerate(more.tolist()):
        wanted = truth.next_logits(row, ids)[1:]
        torch.testing.assert_close(found[row], wanted, atol=1e-4, rtol=1e-4)
