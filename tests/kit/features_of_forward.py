"""Features of `forward`, each with its check on a bench."""

from __future__ import annotations

import functools
import logging
import warnings

import torch
from kit import zoo
from kit.family_facts import fact
from kit.feature_bench import CLOSE, DETAILS, STEPS, Bench, Features, check_greedy, register
from kit.oracle import Truth, decoder_of

FORWARD: Features = {}
feature = functools.partial(register, FORWARD)


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
    first = bench.case.shape.decoder.attending[0]
    weight = decoder_of(bench.model).layers[first].self_attn.v_proj.weight
    expected = truth.decoder.layers[first].self_attn.v_proj.weight
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
    layers = len(decoder_of(bench.model).layers)
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
        runs = int(torch.nn.functional.pad(mask.int(), (1, 0)).diff().clamp_min(0).sum())
        if runs != len(kept):  # words within images: each run counts as one
            assert len(bench.handle.last.kept) == runs
            continue
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
    if fact(bench.reference, "EACH_TILE"):  # which counts as an image
        assert len(bench.handle.last.kept) == sum(
            len(t.blocks) for t in bench.case.tilings(zoo.BATCH)
        )
        return
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
