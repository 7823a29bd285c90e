"""Features of caches that one call leaves to the next, each with its check on a bench."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import vlmprune
from kit import skips, zoo
from kit.feature_bench import (
    CLOSE,
    DETAILS,
    ELASTIC,
    ONE_BY_ONE,
    PRESS,
    STEPS,
    Bench,
    Features,
    check_greedy,
    register,
)
from kit.oracle import Truth
from transformers import DynamicCache
from vlmprune.adapters.cache_names import CACHE

CACHES: Features = {}
feature = functools.partial(register, CACHES)


@feature("deepcopy of the cache")
def copied_cache(bench):
    inputs, truth = bench.prefill()
    first = bench.generate(inputs, **DETAILS)
    cache = first[CACHE]
    for past, word in ((copy.deepcopy(cache), 5), (copy.deepcopy(cache), 6), (cache, 7)):
        ids = torch.cat([first.sequences, torch.full((3, 2), word)], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(3, STEPS + 2).long()], 1)
        out = bench.model.generate(
            input_ids=ids,
            attention_mask=mask,
            **{CACHE: past},
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
    cache = bench.generate(inputs, **DETAILS)[CACHE]  # all but the last new token
    with pytest.raises(vlmprune.UnsupportedFeatureError, match="crop"):
        copy.deepcopy(cache).crop(-STEPS - 10)  # into the image
    for new in ([5, 9], [6]):
        past = copy.deepcopy(cache)
        past.crop(1 - STEPS)
        assert past.get_seq_length() == inputs["input_ids"].shape[1]
        with torch.no_grad():
            out = bench.model(input_ids=torch.tensor([new]), **{CACHE: past})
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
        cache = copy.deepcopy(first[CACHE])
        change(cache)
        order = torch.tensor(rows)
        if bench.case.packed:  # transformers keeps the rows' offsets on the module
            offsets = [truth.rows[b].next_position - len(truth.rows[b].ids) for b in rows]
            bench.model.model.rope_deltas = torch.tensor(offsets)[:, None]
        out = bench.model.generate(
            input_ids=ids[order],
            attention_mask=mask[order],
            **{CACHE: cache},
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
            model(input_ids=inputs["input_ids"][:, :5], **{CACHE: cache}, use_cache=True)
        return model.generate(
            **inputs, **{CACHE: cache}, max_new_tokens=STEPS, do_sample=False, **DETAILS
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
                        **{CACHE: out[CACHE]},
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
        cache = bench.model(**inputs)[CACHE]
        step = torch.tensor([[5, zoo.IMAGE, 9]])  # an image token that is no image is text
        out = bench.model(input_ids=step, **{CACHE: cache})
    truth.pieces = (3,)
    torch.testing.assert_close(out.logits[0], truth.next_logits(0, step[0])[1:], **CLOSE)
