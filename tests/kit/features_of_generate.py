"""Features of `generate`, each with its check on a bench."""

from __future__ import annotations

import copy
import functools

import torch
import vlmprune
from kit import zoo
from kit.encoder_oracle import left_by_encoder
from kit.feature_bench import (
    CLOSE,
    DETAILS,
    ONE_BY_ONE,
    STEPS,
    Bench,
    Features,
    check_greedy,
    check_tokens,
    register,
)
from kit.oracle import Truth
from transformers.generation.streamers import BaseStreamer
from vlmprune.adapters.cache_names import CACHE

GENERATE: Features = {}
feature = functools.partial(register, GENERATE)


@feature("greedy search")
def greedy(bench):
    inputs, truth = bench.prefill()
    check_greedy(bench.generate(inputs, **DETAILS), truth)


@feature("sampling")
def sampling(bench):
    inputs, truth = bench.prefill()
    torch.manual_seed(7)
    found = bench.generate(inputs, do_sample=True, top_k=0)
    check_tokens(found, truth.sample(STEPS, seed=7))


@feature("num_return_sequences")
def several_sequences(bench):
    inputs, truth = bench.prefill()
    torch.manual_seed(3)
    found = bench.generate(inputs, do_sample=True, top_k=0, num_return_sequences=2)
    assert len(found) == 2 * len(inputs["input_ids"])
    check_tokens(found, truth.sample(STEPS, seed=3, copies=2))


@feature("beam search")
def beam_search(bench):
    inputs, truth = bench.prefill()
    out = bench.generate(inputs, num_beams=3, num_return_sequences=2, output_scores=True, **DETAILS)
    tokens, scores = truth.beams(STEPS, 3)
    check_tokens(out.sequences, tokens[:, :2].flatten(0, 1))
    torch.testing.assert_close(out.sequences_scores, scores[:, :2].flatten(), **CLOSE)


@feature("second turn on the same cache")
def second_turn(bench):
    inputs, truth = bench.prefill()
    first = bench.generate(inputs, **DETAILS)
    question = torch.tensor([[5, 17, 60, 9]] * len(inputs["input_ids"]))
    ids = torch.cat([first.sequences, question], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), STEPS + 4).long()], 1)
    second = bench.model.generate(
        input_ids=ids,
        attention_mask=mask,
        **{CACHE: first[CACHE]},
        max_new_tokens=STEPS,
        do_sample=False,
        **DETAILS,
    )
    assert torch.equal(second.sequences[:, : ids.shape[1]], ids)
    given = torch.cat([first.sequences[:, -STEPS:], question], 1)
    check_greedy(second, truth, given=given, pieces=(*ONE_BY_ONE, 5))
    tokens = bench.handle.last.tokens_in
    assert tokens == bench.case.counts(bench.rows), "a text turn is no prefill with visual tokens"


@feature("second turn with a new image")
def second_turn_with_an_image(bench):
    bench = Bench(bench.case, bench.place, plain=True, instead=bench.instead)
    rows = (zoo.ONE,)
    follow_up = bench.case.inputs(((4, "A", 3),))

    def turns(model):
        inputs = bench.case.inputs(rows)
        first = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False, **DETAILS)
        images = [zoo.encoder_inputs(x)["image"] for x in (inputs, follow_up)]
        merged = {"input_ids": torch.cat([first.sequences, follow_up["input_ids"]], 1)}
        merged["attention_mask"] = torch.ones_like(merged["input_ids"])
        if bench.case.packed:
            merged["mm_token_type_ids"] = (merged["input_ids"] == zoo.IMAGE).int()
        together = zoo.joined(*images)
        new = {**merged, **images[1]}
        if bench.case.packed:
            new["image_grid_thw"] = together["image_grid_thw"]
        merged |= together
        kept = copy.copy(bench.handle.last.stages) if model is bench.model else []
        out = model.generate(
            **new,
            **{CACHE: first[CACHE]},
            max_new_tokens=STEPS,
            do_sample=False,
            **DETAILS,
        )
        return merged, kept, out

    bench.upstream(turns)
    _ = bench.handle
    inputs, kept, out = turns(bench.model)
    cuts = [
        (one.layer, [*one.kept, *two.kept])
        for one, two in zip(kept, bench.handle.last.stages, strict=True)
    ]
    modes = [stage.positions for stage in bench.handle.last.stages]
    make = Truth
    if bench.place == "in the encoder":
        left = left_by_encoder(bench.case, inputs, bench.model)
        make, cuts = left.truth, [(0, left.rows)]
    check_greedy(out, make(bench.case.reference("eager"), inputs, cuts, modes))


@feature("use_cache=False")
def without_cache(bench):
    inputs, truth = bench.prefill()
    check_greedy(bench.generate(inputs, use_cache=False, **DETAILS), truth)
    beams = bench.generate(inputs, use_cache=False, num_beams=2)
    check_tokens(beams, truth.beams(STEPS, 2)[0][:, 0])
    with torch.no_grad():
        out = bench.model(**inputs, use_cache=False)
    assert CACHE not in out
    expected = torch.stack([truth.next_logits(b)[-1] for b in range(len(truth.rows))])
    torch.testing.assert_close(out.logits[:, -1], expected, **CLOSE)


@feature("prompt lookup decoding")
def prompt_lookup(bench):
    inputs, truth = bench.prefill(zoo.SINGLE)
    found = bench.generate(inputs, prompt_lookup_num_tokens=2, max_new_tokens=6)
    check_tokens(found, truth.decode(6)[0])
    # A prompt that holds its own continuation, so that candidates are accepted and the cache is
    # cropped in between.
    ids = torch.cat([inputs["input_ids"], found[:, -6:], found[:, -6:-4]], 1)
    longer = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if bench.case.packed:
        longer["mm_token_type_ids"] = (ids == zoo.IMAGE).int()
    with torch.no_grad():
        bench.model(**longer)
    truth = bench.truth(longer)
    check_tokens(
        bench.generate(longer, prompt_lookup_num_tokens=3, max_new_tokens=6), truth.decode(6)[0]
    )


@feature("assistant model")
def assistant(bench):
    inputs, truth = bench.prefill(zoo.SINGLE)
    bench.upstream(
        lambda model: model.generate(
            **inputs, max_new_tokens=6, do_sample=False, assistant_model=bench.case.model()
        )
    )
    dense = bench.case.model()
    check_tokens(
        bench.generate(inputs, assistant_model=dense, max_new_tokens=6), truth.decode(6)[0]
    )
    twin = bench.case.model()
    vlmprune.patch(twin, bench.calls)
    check_tokens(bench.generate(inputs, assistant_model=twin, max_new_tokens=6), truth.decode(6)[0])


@feature("static cache")
def static_cache(bench):
    for rows in (zoo.SINGLE, zoo.BATCH):
        inputs, truth = bench.prefill(rows)
        out = bench.generate(inputs, cache_implementation="static", max_new_tokens=4, **DETAILS)
        check_greedy(out, truth, steps=4)


@feature("prefill in chunks")
def prefill_chunks(bench):
    inputs, truth = bench.prefill(zoo.SINGLE)
    check_greedy(bench.generate(inputs, prefill_chunk_size=8, **DETAILS), truth)


@feature("continuous batching")
def continuous_batching(bench):
    inputs, truth = bench.prefill(zoo.SINGLE)
    found = bench.model.generate_batch(inputs=inputs["input_ids"].tolist())
    check_tokens(torch.tensor([found]), truth.decode(1)[0])


class Collect(BaseStreamer):
    """Writes down what a streamer is given."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


@feature("streamer")
def streamer(bench):
    inputs, truth = bench.prefill(zoo.SINGLE)
    collect = Collect()
    bench.generate(inputs, streamer=collect)
    assert collect.ended
    expected = inputs["input_ids"][0].tolist() + truth.decode(STEPS)[0][0].tolist()
    assert collect.tokens == expected


@feature("no attention_mask")
def no_mask(bench):
    inputs, truth = bench.prefill(zoo.SINGLE)
    del inputs["attention_mask"]
    check_greedy(bench.generate(inputs, **DETAILS), truth)
    with torch.no_grad():
        logits = bench.model(**inputs).logits
    torch.testing.assert_close(logits[0], truth.full_logits(0), **CLOSE)
