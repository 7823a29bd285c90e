"""A patched model that serves several threads: what each of them is told."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import vlmprune
from kit import zoo
from transformers import DynamicCache
from vlmprune.adapters.cache_names import CACHE

LLAVA = zoo.CASES["llava-clip-llama"]
OPTIONS = {"max_new_tokens": 4, "do_sample": False}


def generate(model, case, rows=zoo.SINGLE, **options):
    return model.generate(**case.inputs(rows), **OPTIONS, **options)


# --- handle.last -------------------------------------------------------------------------------


def test_each_thread_has_its_own_last():
    model = LLAVA.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    generate(model, LLAVA, (zoo.TWO,))
    barrier = threading.Barrier(3)

    def ask(rows):
        with pytest.raises(RuntimeError, match="in this thread"):
            _ = handle.last
        generate(model, LLAVA, rows)
        barrier.wait(timeout=30)
        return handle.last.tokens_in

    prompts = [(zoo.ONE,), (zoo.TWO,), ((4, "B", 3, "C", 3, "A", 1),)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, prompts)) == [LLAVA.counts(rows) for rows in prompts]
    assert handle.last.tokens_in == LLAVA.counts((zoo.TWO,))


@zoo.FAMILIES
@pytest.mark.parametrize("name", ["divprune", "fastv"])
def test_a_prefill_without_images_says_so(case, name):
    model = case.model()
    handle = vlmprune.patch(model, name, keep_ratio=0.4)
    text = case.inputs((zoo.NONE,))
    with torch.no_grad():
        for run in (
            lambda: model(**text),
            lambda: model(**text, use_cache=False),
            lambda: model(**text, **{CACHE: DynamicCache(config=model.config.text_config)}),
            lambda: model.generate(**text, **OPTIONS),
            lambda: model.generate(**text, **OPTIONS, cache_implementation="static"),
        ):
            generate(model, case)
            assert handle.last.kept and handle.last.note is None
            run()
            assert not handle.last.kept and "no images" in handle.last.note
            assert handle.last.tokens_per_layer == []


@zoo.BOTH_FAMILIES
def test_going_on_in_text_is_no_prefill(case):
    model = case.model()
    handle = vlmprune.patch(model, "fastv", keep_ratio=0.4)
    first = generate(model, case, return_dict_in_generate=True)
    last = handle.last
    ids = torch.cat([first.sequences, torch.tensor([[5, 6]])], 1)
    cache = first[CACHE]
    second = model.generate(
        input_ids=ids, **{CACHE: cache}, return_dict_in_generate=True, **OPTIONS
    )
    assert handle.last is last and first.vlmprune_last is last
    assert second.vlmprune_last is None


@zoo.BOTH_FAMILIES
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_the_output_of_generate_carries_it_to_other_threads(case, options):
    model = case.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(generate, model, case, return_dict_in_generate=True, **options)
        out = run.result()
        there = pool.submit(lambda: handle.last).result()
    assert out.vlmprune_last is there and there.tokens_in == case.counts(zoo.SINGLE)
    assert "vlmprune_last" not in out  # no entry of the mapping: only what transformers puts there
    with pytest.raises(RuntimeError, match="vlmprune_last"):
        _ = handle.last


def test_a_prefill_that_fails_keeps_the_one_before():
    model = LLAVA.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    generate(model, LLAVA)
    last = handle.last
    with pytest.raises(vlmprune.UnsupportedFeatureError):
        generate(model, LLAVA, prefill_chunk_size=4)
    assert handle.last is last


# --- attributes --------------------------------------------------------------------------------


def test_a_handle_takes_no_attributes():
    handle = vlmprune.patch(LLAVA.model(), "divprune", keep_ratio=0.4)
    with pytest.raises(AttributeError, match=r"handle\.set\(keep_ratio=0\.5\)"):
        handle.keep_ratio = 0.5
    for name in ("positions", "anything"):
        with pytest.raises(AttributeError, match=f"{name}.*handle.set"):
            setattr(handle, name, 1)
    assert handle.methods[0].budget.value == 0.4
