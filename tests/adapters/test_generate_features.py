"""Every feature of `forward` and `generate`, once per place where methods act.

A feature either gives what the slow oracle gives, or is refused at the call with
`UnsupportedFeatureError`; `REFUSED` says which, and features.json, of which the table in
adapters/README.md is made. After a deliberate change it is renewed by
`PYTHONPATH=tests python tests/adapters/test_generate_features.py --write`.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import vlmprune
from kit import skips, zoo
from kit.oracle import Rows, Truth
from kit.paths import TESTS
from kit.reported import Noted, cached_truth, features_of, truth_of
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import Place

TWO_PLACES = [
    vlmprune.method("divprune", keep_ratio=0.5),
    vlmprune.method("fastv", keep_ratio=0.25, layer=2),
]
ELASTIC = vlmprune.method("elastic_cache", keep_ratio=0.15, distance=-4)
"""Evicts entries from the second new token on."""
PRESS = vlmprune.method("visual_press", keep_ratio=0.2)
SELECT = MethodCall(method=Noted(n_init=2, n_local=3), budget=Budget("keep_ratio", 0.2))
PLACES = {
    "before the LLM": [vlmprune.method("divprune", keep_ratio=0.4)],
    "in the decoder": [vlmprune.method("pyramiddrop", keep_ratio=0.2)],
    "on the cache": [ELASTIC],
    "all": [*TWO_PLACES, ELASTIC],
}
MOVED = {
    "before the LLM": [vlmprune.method("visionzip", keep_ratio=0.4, scores="cls")],
    "in the decoder": [vlmprune.method("sparsevlm", keep_ratio=0.2)],
    "on the cache": [PRESS],
    "all": [vlmprune.method("visionzip", keep_ratio=0.5, scores="cls"), TWO_PLACES[1], PRESS],
}
"""The same places with rows that are merged, moved, or no token (CLS of every tile)."""
MERGED = {
    "before the LLM": [vlmprune.method("pool", keep_ratio=0.4)],
    "in the decoder": MOVED["in the decoder"],
    "on the cache": [SELECT],
    "all": [vlmprune.method("pool", keep_ratio=0.5), TWO_PLACES[1], SELECT],
}
"""The same places with rows that are merged."""
CALLS = {"llava_next": MOVED, "llava_onevision": MERGED, "qwen3_vl": MERGED}
STEPS = 3
CLOSE = {"atol": 1e-4, "rtol": 1e-4}

CACHE = {"on the cache", "all"}
INSIDE = {"in the decoder", *CACHE}
REFUSED: dict[str, tuple[set[str], str]] = {
    "prefill in chunks": (set(PLACES), "prefill_chunk_size"),
    "continuous batching": (set(PLACES), "generate_batch"),
    "4-D attention mask": (set(PLACES), "4-D"),
    "prompt lookup decoding": (INSIDE, "prompt_lookup_num_tokens"),
    "assistant model": (INSIDE, "assistant_model"),
    "use_cache=False": (CACHE, "use_cache=False"),
    "static cache": (CACHE, "cache_implementation"),
    "second turn with a new image": (CACHE, "new image"),
}
"""Features that are refused, at which places, and a word that the message holds."""

FEATURES: dict[str, Callable[[Bench], None]] = {}
SLOW = {"torch.compile"}
"""Features that are run with all cuts at once only, and not on every place."""


def feature(name: str):
    def register(function):
        FEATURES[name] = function
        return function

    return register


@dataclass
class Bench:
    """One patched model, and what it must compute."""

    case: zoo.Case
    place: str
    plain: bool = False
    """Whether tokens must enter as they are."""
    rows: tuple[zoo.Row, ...] = zoo.BATCH
    instead: Sequence[MethodCall] = ()
    """Methods in place of those of the place."""

    @property
    def calls(self):
        if self.instead:
            return self.instead
        return (PLACES if self.plain else CALLS.get(self.case.name, PLACES))[self.place]

    @functools.cached_property
    def model(self):
        return self.case.model()

    @functools.cached_property
    def handle(self):
        return vlmprune.patch(self.model, self.calls)

    @property
    def reference(self):
        return self.case.reference()

    def prefill(self, rows=None) -> tuple[dict, Truth]:
        """Inputs, and the truth for the tokens that the patched model keeps of them."""
        inputs = self.case.inputs(rows or self.rows)
        _ = self.handle
        with torch.no_grad():
            self.model(**inputs)
        return inputs, self.truth(inputs)

    def truth(self, inputs: dict) -> Truth:
        if self.handle.methods[-1].method.place is Place.CACHE:
            return cached_truth(self.case, inputs, self.model, self.handle)
        assert self.handle.last.stages
        return truth_of(self.case, inputs, self.model, self.handle)

    def generate(self, inputs: dict, **options):
        options = {"max_new_tokens": STEPS, "do_sample": False, **options}
        return self.model.generate(**inputs, **options)

    def upstream(self, call: Callable):
        """Run the call on the unpatched model; where that fails, there is nothing to hold."""
        try:
            return call(self.reference)
        except Exception as error:
            skips.skip("fails unpatched", f"{type(error).__name__}: {str(error)[:80]}")

    def positions(self, inputs: dict) -> dict:
        """Explicit positions where the model cannot work them out from embeddings."""
        if not self.case.packed:
            return {}
        mask = inputs["attention_mask"]
        grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw") if k in inputs}
        index, _ = self.reference.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], attention_mask=mask, **grids
        )
        text = (mask.cumsum(-1) - 1).clamp_min(0)
        return {"position_ids": torch.cat([text[None], index])}


def check_tokens(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found[:, -expected.shape[1] :], expected)


def check_greedy(
    out, truth: Truth, steps: int = STEPS, given=None, pieces: Sequence[int] = ()
) -> None:
    """Tokens and the logits of every step; `pieces`: how many tokens were fed at once."""
    truth.pieces = pieces
    tokens, logits = truth.decode(steps, given=given)
    torch.testing.assert_close(torch.stack(out.logits), logits, **CLOSE)
    check_tokens(out.sequences, tokens)


ONE_BY_ONE = (1,) * (STEPS - 1)
"""Tokens of a turn of generate(), whose last one is fed with the next turn."""
DETAILS = {"return_dict_in_generate": True, "output_logits": True}


# --- generate ----------------------------------------------------------------------------------


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
        past_key_values=first.past_key_values,
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
            past_key_values=first.past_key_values,
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
    truth = Truth(bench.case.reference("eager"), inputs, cuts, modes)
    check_greedy(out, truth)


@feature("use_cache=False")
def without_cache(bench):
    inputs, truth = bench.prefill()
    check_greedy(bench.generate(inputs, use_cache=False, **DETAILS), truth)
    beams = bench.generate(inputs, use_cache=False, num_beams=2)
    check_tokens(beams, truth.beams(STEPS, 2)[0][:, 0])
    with torch.no_grad():
        out = bench.model(**inputs, use_cache=False)
    assert out.past_key_values is None
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


# --- caches ------------------------------------------------------------------------------------


@feature("deepcopy of the cache")
def copied_cache(bench):
    inputs, truth = bench.prefill()
    first = bench.generate(inputs, **DETAILS)
    cache = first.past_key_values
    for past, word in ((copy.deepcopy(cache), 5), (copy.deepcopy(cache), 6), (cache, 7)):
        ids = torch.cat([first.sequences, torch.full((3, 2), word)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, STEPS + 2).long()], 1)
        out = bench.model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=past,
            max_new_tokens=2,
            do_sample=False,
            **DETAILS,
        )
        given = ids[:, -STEPS - 2 :]
        check_greedy(out, truth, steps=2, given=given, pieces=(*ONE_BY_ONE, 3))


@feature("crop of the cache")
def cropped_cache(bench):
    if ELASTIC in bench.calls:  # nothing goes back behind an entry that was evicted
        bench = Bench(bench.case, bench.place, instead=[*bench.calls[:-1], PRESS])
    inputs, truth = bench.prefill(zoo.SINGLE)
    cache = bench.generate(inputs, **DETAILS).past_key_values  # all but the last new token
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="crop"):
        copy.deepcopy(cache).crop(-STEPS - 10)  # into the image
    for new in ([5, 9], [6]):
        past = copy.deepcopy(cache)
        past.crop(1 - STEPS)
        assert past.get_seq_length() == inputs["input_ids"].shape[1]
        with torch.no_grad():
            out = bench.model(input_ids=torch.tensor([new]), past_key_values=past)
        truth.pieces = (len(new),)
        torch.testing.assert_close(out.logits[0], truth.next_logits(0, new)[1:], **CLOSE)


@feature("rows of the cache chosen")
def chosen_rows(bench):
    inputs, truth = bench.prefill()
    first = bench.generate(inputs, **DETAILS)
    tail = torch.tensor([[5], [6], [8]])
    ids = torch.cat([first.sequences, tail], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, STEPS + 1).long()], 1)
    changes = {
        (2, 0): lambda cache: cache.batch_select_indices(torch.tensor([2, 0])),
        (1, 2, 0): lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])),
        (0, 0, 1, 1, 2, 2): lambda cache: cache.batch_repeat_interleave(2),
    }
    for rows, change in changes.items():
        cache = copy.deepcopy(first.past_key_values)
        change(cache)
        order = torch.tensor(rows)
        if bench.case.packed:  # transformers keeps the rows' offsets on the module
            offsets = [truth.rows[b].next_position - len(truth.rows[b].ids) for b in rows]
            bench.model.model.rope_deltas = torch.tensor(offsets)[:, None]
        out = bench.model.generate(
            input_ids=ids[order],
            attention_mask=mask[order],
            past_key_values=cache,
            max_new_tokens=2,
            do_sample=False,
            **DETAILS,
        )
        twin = copy.copy(truth)
        twin.rows = [truth.rows[b] for b in rows]
        given = ids[order, -STEPS - 1 :]
        check_greedy(out, twin, steps=2, given=given, pieces=(*ONE_BY_ONE, 2))


@feature("cached text prefix, then an image")
def prefix(bench):
    if ELASTIC in bench.calls:  # whose entries the reference merges only where all are new
        bench = Bench(bench.case, bench.place, instead=[*bench.calls[:-1], PRESS])
    inputs = bench.case.inputs(zoo.SINGLE)

    def turns(model):
        cache = DynamicCache(config=model.config.text_config)
        with torch.no_grad():
            model(input_ids=inputs["input_ids"][:, :5], past_key_values=cache, use_cache=True)
        return model.generate(
            **inputs, past_key_values=cache, max_new_tokens=STEPS, do_sample=False, **DETAILS
        )

    dense = bench.upstream(turns)
    plain = Truth(bench.case.reference("eager"), inputs)
    if not torch.allclose(dense.logits[0][0], plain.next_logits(0)[-1], atol=1e-3):
        skips.skip("differs unpatched")
    _ = bench.handle
    out = turns(bench.model)
    check_greedy(out, bench.truth(inputs))


@feature("decoding loop by hand")
def own_loop(bench):
    for rows, masked in ((zoo.SINGLE, False), (zoo.SINGLE, True), (zoo.BATCH, True)):
        inputs = bench.case.inputs(rows)

        def loop(model, inputs=inputs, masked=masked):
            inputs = dict(inputs)
            mask = inputs["attention_mask"]
            if not masked:
                del inputs["attention_mask"]
            logits = []
            with torch.no_grad():
                out = model(**inputs, use_cache=True)
                logits.append(out.logits[:, -1])
                for _ in range(STEPS - 1):
                    mask = torch.cat([mask, torch.ones(len(mask), 1).long()], 1)
                    extra = {"attention_mask": mask} if masked else {}
                    out = model(
                        input_ids=logits[-1].argmax(-1, keepdim=True),
                        past_key_values=out.past_key_values,
                        use_cache=True,
                        **extra,
                    )
                    logits.append(out.logits[:, -1])
            return torch.stack(logits)

        try:
            loop(bench.reference)
        except Exception:  # Qwen's own position code fails on a grown mask
            assert bench.case.packed and masked
            continue
        _, truth = bench.prefill(rows)
        torch.testing.assert_close(loop(bench.model), truth.decode(STEPS)[1], **CLOSE)


@feature("several tokens at once after the prompt")
def several_tokens(bench):
    inputs, truth = bench.prefill(zoo.SINGLE)
    with torch.no_grad():
        cache = bench.model(**inputs).past_key_values
        step = torch.tensor([[5, zoo.IMAGE, 9]])  # an image token that is no image is text
        out = bench.model(input_ids=step, past_key_values=cache)
    truth.pieces = (3,)
    torch.testing.assert_close(out.logits[0], truth.next_logits(0, step[0])[1:], **CLOSE)


# --- forward -----------------------------------------------------------------------------------


@feature("logits_to_keep")
def logits_to_keep(bench):
    inputs, _ = bench.prefill()
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        full = bench.model(**inputs).logits
        assert full.shape[1] == length
        for keep in (1, 3, length):
            found = bench.model(**inputs, logits_to_keep=keep).logits
            torch.testing.assert_close(found, full[:, -keep:], **CLOSE)
        which = torch.tensor([0, length // 2, length - 1])
        found = bench.model(**inputs, logits_to_keep=which).logits
        torch.testing.assert_close(found, full[:, which], **CLOSE)


@feature("explicit position_ids")
def explicit_positions(bench):
    inputs, truth = bench.prefill()
    given = {**inputs, **bench.positions(inputs)}
    if not bench.case.packed:
        given["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        logits = bench.model(**given).logits
    for b, row in enumerate(truth.rows):
        torch.testing.assert_close(logits[b, row.columns], truth.full_logits(b), **CLOSE)
    check_greedy(bench.generate(given, **DETAILS), truth)


@feature("logits of the whole prompt")
def all_logits(bench):
    inputs, truth = bench.prefill()
    with torch.no_grad():
        logits = bench.model(**inputs).logits
    for b, row in enumerate(truth.rows):
        torch.testing.assert_close(logits[b, row.columns], truth.full_logits(b), **CLOSE)


def text_labels(inputs) -> torch.Tensor:
    """Every text token but the first of a row, which has nothing before it to be told from."""
    labels, mask = inputs["input_ids"].clone(), inputs["attention_mask"]
    first = mask.cumsum(-1) == 1
    labels[zoo.is_visual(labels) | (mask == 0) | first] = -100
    return labels


@feature("labels")
def labels(bench):
    inputs, truth = bench.prefill()
    answers = text_labels(inputs)
    with torch.no_grad():
        out = bench.model(**inputs, labels=answers)
    assert out.logits.shape[:2] == answers.shape
    torch.testing.assert_close(out.loss, truth.loss(list(answers)), **CLOSE)


@feature("backward")
def backward(bench):
    inputs, truth = bench.prefill()
    answers = text_labels(inputs)
    weight = bench.model.model.language_model.layers[0].self_attn.v_proj.weight
    expected = truth.decoder.layers[0].self_attn.v_proj.weight
    try:
        weight.requires_grad_(True)
        expected.requires_grad_(True)
        bench.model(**inputs, labels=answers).loss.backward()
        truth.loss(list(answers)).backward()
        assert expected.grad.abs().max() > 1e-3
        torch.testing.assert_close(weight.grad, expected.grad, **CLOSE)
    finally:
        expected.requires_grad_(False)
        expected.grad = None


@feature("output_hidden_states")
def hidden_states(bench):
    inputs, truth = bench.prefill()
    with torch.no_grad():
        plain = bench.model(**inputs).logits
        out = bench.model(**inputs, output_hidden_states=True)
    assert torch.equal(out.logits, plain)
    layers = len(bench.model.model.language_model.layers)
    assert len(out.hidden_states) == layers + 1
    first = [truth.cut_inputs(b)[0][0] for b in range(len(truth.rows))]
    assert out.hidden_states[0].shape[1] == max(map(len, first))
    for b, embeds in enumerate(first):
        torch.testing.assert_close(out.hidden_states[0][b, -len(embeds) :], embeds, **CLOSE)
    for state in out.hidden_states:
        assert torch.isfinite(state).all()


@feature("inputs_embeds with pixels")
def embeds_with_pixels(bench):
    inputs, truth = bench.prefill()
    ids = inputs["input_ids"]
    given = {k: v for k, v in inputs.items() if k not in ("input_ids", "mm_token_type_ids")}
    given = {"inputs_embeds": bench.reference.get_input_embeddings()(ids), **given}
    given |= bench.positions(inputs)
    bench.upstream(lambda model: model(**given))
    with torch.no_grad():
        logits = bench.model(**given).logits
    for b, row in enumerate(truth.rows):
        torch.testing.assert_close(logits[b, row.columns], truth.full_logits(b), **CLOSE)
    try:
        bench.reference.generate(**given, max_new_tokens=STEPS)
    except Exception:
        return
    check_greedy(bench.generate(given, **DETAILS), truth)


def merged(bench, rows) -> dict:
    """Embeddings with the image features already in place, no pixels."""
    inputs = bench.case.inputs(rows)
    truth = Truth(bench.reference, inputs)
    embeds = bench.reference.get_input_embeddings()(inputs["input_ids"]).clone()
    for b, row in enumerate(truth.rows):
        embeds[b, row.columns] = row.embeds
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    return given | bench.positions(inputs)


@feature("merged inputs_embeds (warns, prunes nothing)")
def merged_embeds(bench):
    given = merged(bench, zoo.BATCH)
    handle = bench.handle
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        found = [bench.model(**given).logits for _ in range(2)]
    ours = [w for w in caught if "visual_mask" in str(w.message)]
    assert len(ours) == 1, [str(w.message) for w in caught]
    with torch.no_grad():
        assert torch.equal(found[0], bench.reference(**given).logits)
    assert torch.equal(*found)
    assert handle.last.pruned is False
    assert "visual_mask" in handle.last.note


def not_deep(truth: Truth) -> Truth:
    """Merged embeddings bring nothing that is added behind the first layers."""
    for row in truth.rows:
        row.deep = [torch.zeros_like(rows) for rows in row.deep]
    return truth


@feature("merged inputs_embeds with visual_mask=")
def visual_mask(bench):
    bench = Bench(bench.case, bench.place, plain=True)
    for rows in (zoo.SINGLE, zoo.BATCH):
        given = merged(bench, rows)
        inputs, _ = bench.prefill(rows)
        kept = bench.handle.last.kept
        mask = zoo.is_visual(inputs["input_ids"])
        with torch.no_grad():
            logits = bench.model(**given, visual_mask=mask).logits
        truth = not_deep(bench.truth(inputs))
        if not len(truth.deep_layers):
            assert all(map(torch.equal, bench.handle.last.kept, kept))
        for b, row in enumerate(truth.rows):
            torch.testing.assert_close(logits[b, row.columns], truth.full_logits(b), **CLOSE)
        out = bench.generate(given, visual_mask=mask, **DETAILS)
        check_greedy(out, truth)


@feature("precomputed mm_encoder_outputs")
def encoder_outputs(bench):
    inputs, truth = bench.prefill()
    pixels = {k: inputs.pop(k) for k in zoo.encoder_inputs(inputs)["image"]}
    kept = bench.handle.last.kept
    with torch.no_grad():
        features = bench.model.model.get_image_features(**pixels, return_dict=True)
        if "image_grid_thw" in pixels:
            inputs["image_grid_thw"] = pixels["image_grid_thw"]
        logits = bench.model(**inputs, mm_encoder_outputs={"image": features}).logits
    assert all(map(torch.equal, bench.handle.last.kept, kept))
    for b, row in enumerate(truth.rows):
        torch.testing.assert_close(logits[b, row.columns], truth.full_logits(b), **CLOSE)


@feature("padding on the right")
def right_padding(bench):
    left, truth = bench.prefill()
    inputs = bench.case.inputs(zoo.BATCH, padding="right")
    with torch.no_grad():
        logits = bench.model(**inputs).logits
    assert logits.shape[:2] == left["input_ids"].shape
    truth = bench.truth(inputs)  # a last row that is read must be that of the last real token
    alone = [bench.case.inputs((row,)) for row in zoo.BATCH[:2]]
    kept = list(bench.handle.last.kept)
    for single in alone:
        with torch.no_grad():
            bench.model(**single)
        for indices in bench.handle.last.kept:
            assert torch.equal(indices, kept.pop(0))
    for b, row in enumerate(truth.rows):
        torch.testing.assert_close(logits[b, row.columns], truth.full_logits(b), **CLOSE)


@feature("return_dict=False")
def as_tuple(bench):
    inputs, _ = bench.prefill()
    with torch.no_grad():
        expected = bench.model(**inputs).logits
        out = bench.model(**inputs, return_dict=False)
    assert isinstance(out, tuple)
    assert torch.equal(out[0], expected)


@feature("4-D attention mask")
def four_dimensional_mask(bench):
    inputs, truth = bench.prefill(zoo.SINGLE)
    length = inputs["input_ids"].shape[1]
    square = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    given = {**inputs, **bench.positions(inputs), "attention_mask": square}
    with torch.no_grad():
        logits = bench.model(**given).logits
    torch.testing.assert_close(logits[0], truth.full_logits(0), **CLOSE)


@feature("torch.compile")
def compiled(bench):
    inputs, truth = bench.prefill(zoo.SINGLE)
    torch._dynamo.reset()
    log = logging.getLogger("torch.__trace")
    propagated, log.propagate = log.propagate, False  # pytest would format every line of it
    try:
        fast = torch.compile(bench.model, backend="eager")
        with torch.no_grad():
            for _ in range(2):
                logits = fast(**inputs).logits
                torch.testing.assert_close(logits[0], truth.full_logits(0), **CLOSE)
            other = bench.case.inputs(((5, "A", 3),))
            found = fast(**other).logits
        torch.testing.assert_close(found[0], bench.truth(other).full_logits(0), **CLOSE)
    finally:
        log.propagate = propagated
        torch._dynamo.reset()


# --- the matrix --------------------------------------------------------------------------------


def is_refused(name: str, place: str) -> bool:
    return place in REFUSED.get(name, ((), ""))[0]


def matrix():
    """Each place on a family of each kind of positions; on others all places at once."""
    families = zoo.FAMILIES.args[1]
    for case, name, place in itertools.product(families, FEATURES, PLACES):
        if place != "all" and (name in SLOW or case.name not in zoo.TWO_NAMES):
            continue
        if name in SLOW and case.name in CALLS:
            continue
        marks = [pytest.mark.slow] if name in SLOW else []
        label = f"{name}-{place}-{case.name}".replace(" ", "_")
        yield pytest.param(case, name, place, marks=marks, id=label)


@pytest.mark.parametrize(("case", "name", "place"), list(matrix()))
def test_the_feature_works_or_is_refused_at_the_call(case, name, place):
    bench = Bench(case, place)
    if not is_refused(name, place):
        FEATURES[name](bench)
        return
    _ = bench.handle
    with pytest.raises(vlmprune.UnsupportedFeatureError) as refused:
        FEATURES[name](bench)
    assert REFUSED[name][1] in str(refused.value)
    inputs, truth = bench.prefill(zoo.SINGLE)  # and the next call is right
    check_greedy(bench.generate(inputs, **DETAILS), truth)


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize(
    "name", ["use_cache=False", "static cache", "second turn with a new image"]
)
def test_features_that_caches_refuse_work_before_the_llm_and_in_the_decoder_at_once(case, name):
    bench = Bench(case, "in the decoder", instead=TWO_PLACES)
    assert is_refused(name, "all") and not is_refused(name, bench.place)
    FEATURES[name](bench)


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize(
    ("option", "value", "place"),
    [
        ("prefill_chunk_size", 8, "before the LLM"),
        ("prompt_lookup_num_tokens", 2, "in the decoder"),
    ],
)
@pytest.mark.parametrize("where", ["argument", "generation_config", "the model's own"])
def test_refused_options_are_found_wherever_they_are_set(case, option, value, place, where):
    bench = Bench(case, place)
    _ = bench.handle
    options = {}
    if where == "argument":
        options[option] = value
    elif where == "generation_config":
        options["generation_config"] = copy.deepcopy(bench.model.generation_config)
        setattr(options["generation_config"], option, value)
    else:
        setattr(bench.model.generation_config, option, value)
    with pytest.raises(vlmprune.UnsupportedFeatureError, match=option):
        bench.generate(case.inputs(), **options)
    with pytest.raises(vlmprune.UnsupportedFeatureError, match=option):  # ids by position
        inputs = case.inputs()
        bench.model.generate(inputs.pop("input_ids"), **inputs, **options)


VIDEO_CASES = pytest.mark.parametrize(
    "case",
    [case for case in zoo.FAMILIES.args[1] if case.layout.takes_videos],
    ids=lambda case: case.name,
)


@VIDEO_CASES
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name",
    [
        "greedy search",
        "beam search",
        "second turn on the same cache",
        "use_cache=False",
        "logits of the whole prompt",
        "labels",
        "inputs_embeds with pixels",
    ],
)
def test_features_with_videos_beside_images(case, name, place):
    bench = Bench(case, place, rows=zoo.MIXED)
    if is_refused(name, place):
        with pytest.raises(vlmprune.UnsupportedFeatureError, match=REFUSED[name][1]):
            FEATURES[name](bench)
    else:
        FEATURES[name](bench)


@VIDEO_CASES
@pytest.mark.parametrize("place", PLACES)
def test_precomputed_encoder_outputs_of_images_and_videos(case, place):
    bench = Bench(case, place, rows=zoo.MIXED)
    inputs, truth = bench.prefill()
    outputs = {}
    with torch.no_grad():
        for kind, given in zoo.encoder_inputs(inputs).items():
            encode = getattr(bench.model.model, f"get_{kind}_features")
            outputs[kind] = encode(**given, return_dict=True)
            for key in given:
                if "grid" not in key:  # which Qwen's positions are made of
                    del inputs[key]
        logits = bench.model(**inputs, mm_encoder_outputs=outputs).logits
    for b, row in enumerate(truth.rows):
        torch.testing.assert_close(logits[b, row.columns], truth.full_logits(b), **CLOSE)


@zoo.FAMILIES
def test_merged_rows_of_embeddings_that_the_caller_merged(case):
    bench = Bench(case, "before the LLM")
    given, inputs = merged(bench, zoo.BATCH), case.inputs(zoo.BATCH)
    handle = vlmprune.patch(bench.model, "pool", keep_tokens=5)
    with torch.no_grad():
        logits = bench.model(**given, visual_mask=zoo.is_visual(inputs["input_ids"])).logits
    rows = []
    everything = zip(
        features_of(case.reference(), inputs), handle.last.kept, handle.last.groups, strict=True
    )
    for dense, kept, groups in everything:
        rows.append(Rows(kept, torch.stack([dense[members].mean(0) for members in groups])))
    truth = not_deep(Truth(case.reference("eager"), inputs, [(0, rows)], handle.last.positions))
    for b, row in enumerate(truth.rows):
        torch.testing.assert_close(logits[b, row.columns], truth.full_logits(b), **CLOSE)


def test_videos_are_refused_where_the_family_has_none():
    bench = Bench(zoo.CASES["llava-clip-llama"], "before the LLM")
    _ = bench.handle
    videos = torch.zeros(1, 2, 3, zoo.PIXELS, zoo.PIXELS)
    with pytest.raises(vlmprune.UnsupportedFeatureError, match=r"[Vv]ideo"):
        bench.model(**bench.case.inputs(), pixel_values_videos=videos)


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("place", PLACES)
def test_training_with_gradient_checkpointing_is_right_or_refused(case, place):
    bench = Bench(case, place)
    inputs, truth = bench.prefill()
    labels = text_labels(inputs)
    bench.model.activation_checkpointing_enable()
    bench.model.train()
    weight = bench.model.model.language_model.layers[0].self_attn.v_proj.weight
    weight.requires_grad_(True)
    try:
        loss = bench.model(**inputs, labels=labels, use_cache=False).loss
        loss.backward()
    except vlmprune.UnsupportedFeatureError as refused:
        assert "checkpointing_disable" in str(refused)
        assert place != "before the LLM", "checkpointing does not meet a cut before the LLM"
    else:
        torch.testing.assert_close(loss.detach(), truth.loss(list(labels)), **CLOSE)
        assert weight.grad.abs().max() > 1e-3


EXPECTED_FILE = TESTS / "data" / "features.json"
"""Feature -> place -> "works" or "refused", in the order of this file: the table of the page."""


def found() -> dict[str, dict[str, str]]:
    words = {True: "refused", False: "works"}
    return {name: {p: words[is_refused(name, p)] for p in PLACES} for name in FEATURES}


def test_the_table_lists_every_feature():
    assert list(found().items()) == list(json.loads(EXPECTED_FILE.read_text()).items())
    assert set(REFUSED) <= set(FEATURES)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: see the head of this file")
    EXPECTED_FILE.write_text(json.dumps(found(), indent=1) + "\n")
