"""Every feature of `forward` and `generate`, once per place where methods act.

A feature either gives what the slow oracle gives, or is refused at the call with
`UnsupportedFeatureError`; `REFUSED` of `kit/features.py` says which, and features.json, of which
the table in adapters/README.md is made. After a deliberate change it is renewed by
`PYTHONPATH=tests python tests/adapters/test_generate_features.py --write`.
"""

from __future__ import annotations

import copy
import itertools
import json
import sys

import pytest
import torch
import vlmprune
from kit import zoo
from kit.feature_bench import CALLS, CLOSE, DETAILS, PLACES, TWO_PLACES, Bench, check_greedy
from kit.features import FEATURES, REFUSED, SLOW, found, is_refused
from kit.features_of_forward import merged, not_deep, text_labels
from kit.oracle import Rows, Truth, decoder_of
from kit.paths import TESTS
from kit.reported import features_of


def matrix():
    """Each place on one family, and all places at once on one whose positions have several axes.
    Of the other families the first have three features each, and every further one has one; with
    `zoo.EVERY_CELL` the first take turns with all, and these have three."""
    families = zoo.FAMILIES.args[1]
    others = [case for case in families if case.name not in zoo.TWO_NAMES]
    names = [name for name in FEATURES if name not in SLOW]
    for case in (*zoo.OTHER_CASES, *(() if zoo.EVERY_CELL else others)):
        for which in range(3 if zoo.EVERY_CELL or case in others else 1):
            name = names[(zoo.turn_of(case) + which * len(names) // 3) % len(names)]
            place = "all" if case in (*zoo.STORING_CASES, *others) else "in the decoder"
            if place != "all" and name.startswith("merged inputs_embeds"):
                continue  # it brings methods of its own, which read layers that keep a state here
            label = f"{name}-{place}-{case.name}".replace(" ", "_")
            yield pytest.param(case, name, place, id=label)
    turns = dict(zip(FEATURES, itertools.cycle(others))) if zoo.EVERY_CELL else {}
    for case, name, place in itertools.product(families, FEATURES, PLACES):
        everywhere = case.name == zoo.TWO_NAMES[0] and place != "all" and name not in SLOW
        at_once = place == "all" and (case.name == zoo.TWO_NAMES[1] or case == turns.get(name))
        if not everywhere and not at_once:
            continue
        if name in SLOW and case.name in CALLS:
            continue
        marks = [pytest.mark.slow] if name in SLOW else []
        label = f"{name}-{place}-{case.name}".replace(" ", "_")
        yield pytest.param(case, name, place, marks=marks, id=label)


@pytest.mark.parametrize(("case", "name", "place"), list(matrix()))
def test_the_feature_works_or_is_refused_at_the_call(case, name, place):
    bench = Bench(case, place)
    if not is_refused(name, place if case.whole_cache else "in the decoder"):
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


WITH_VIDEOS = {
    "greedy search": set(PLACES),
    "beam search": {"all"},
    "second turn on the same cache": {"all"},
    "use_cache=False": {"in the decoder", "all"},
    "logits of the whole prompt": {"all"},
    "labels": set(PLACES),
    "inputs_embeds with pixels": {"in the encoder", "all"},
}
"""Features, and the places where each is seen on one family; all places at once on every one."""


@pytest.mark.parametrize(
    ("case", "place", "name"),
    [
        pytest.param(case, place, name, id=f"{name}-{place}-{case.name}".replace(" ", "_"))
        for case, place, name in itertools.product(VIDEO_CASES.args[1], PLACES, WITH_VIDEOS)
        if place == "all" or (case.name in zoo.TWO_NAMES and place in WITH_VIDEOS[name])
    ],
)
def test_features_with_videos_beside_images(case, name, place):
    bench = Bench(case, place, rows=zoo.MIXED)
    if is_refused(name, place):
        with pytest.raises(vlmprune.UnsupportedFeatureError, match=REFUSED[name][1]):
            FEATURES[name](bench)
    else:
        FEATURES[name](bench)


@pytest.mark.parametrize(
    ("case", "place"),
    [
        pytest.param(case, place, id=f"{place}-{case.name}".replace(" ", "_"))
        for case, place in itertools.product(VIDEO_CASES.args[1], PLACES)
        if place in ("in the encoder", "all") or case.name in zoo.TWO_NAMES
        if place != "in the encoder" or not case.layout.resampled
    ],
)
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
    weight = decoder_of(bench.model).layers[0].self_attn.v_proj.weight
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
"""Feature -> place -> "works" or "refused", in the order of `FEATURES`: the table of the page."""


def test_the_table_lists_every_feature():
    assert list(found().items()) == list(json.loads(EXPECTED_FILE.read_text()).items())
    assert set(REFUSED) <= set(FEATURES)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: see the head of this file")
    EXPECTED_FILE.write_text(json.dumps(found(), indent=1) + "\n")
