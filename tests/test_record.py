"""`patch(..., record=True)`: the scores by which a method ranked the tokens, numbered like them."""

from __future__ import annotations

import pytest
import torch
import vlmprune
import zoo
from vlmprune.prune.contract import CacheMethod
from vlmprune.prune.registry import method_class

TOP = ("cls_topk", "vtc_cls", "fopru", "fastv", "pyramiddrop", "spatten", "transprune")
"""Methods that keep the largest scores, and nothing else."""
PLAIN, TILES = zoo.CASES["llava-clip-llama"], zoo.CASES["llava_next"]
"""One tile of a few tokens; a thumbnail, tiles and newlines."""


def run(case, name, *, rows=zoo.SINGLE, record=True, **options):
    model = case.model()
    options = {"keep_ratio": 0.3} | options
    handle = zoo.patch_or_refusal(model, case, name, record=record, **options)
    with torch.no_grad():
        logits = model(**case.inputs(rows)).logits
    return handle, logits


def removing() -> list[str]:
    names = vlmprune.methods()
    return [name for name in names if not issubclass(method_class(name), CacheMethod)]


@pytest.mark.parametrize("case", [PLAIN, TILES], ids=lambda case: case.name)
@pytest.mark.parametrize("name", removing())
def test_each_method_shows_its_scores_or_says_why_it_has_none(case, name):
    handle, logits = run(case, name, rows=zoo.BATCH)
    without, same = run(case, name, rows=zoo.BATCH, record=False)
    assert torch.equal(logits, same)
    assert all(map(torch.equal, handle.last.kept, without.last.kept))
    unranked = method_class(name).unranked
    assert unranked is None or (unranked == unranked.strip(" .") and unranked)
    for stage in handle.last.stages:
        for scores, tokens in zip(stage.scores, handle.last.tokens_in, strict=True):
            if scores is None:
                assert unranked is not None
                continue
            assert scores.shape == (tokens,) and scores.dtype == torch.float32
            assert not scores.isnan().all() and not scores.isinf().any()
    if unranked is None:
        assert all(scores is not None for scores in handle.last.scores)


def compared(last, stage, image) -> list[torch.Tensor]:
    """The tokens that compete with each other at a stage: of a tile, or all of the image."""
    if stage.layer:
        return [torch.arange(last.tokens_in[image])]
    tiling, cpu = last.tilings[image], torch.device("cpu")
    return [tiling.patches(cpu)[numbers] for numbers in tiling.tile_patches(cpu)]


@pytest.mark.parametrize("name", TOP)
@pytest.mark.parametrize("case", [PLAIN, TILES], ids=lambda case: case.name)
def test_what_is_kept_has_the_largest_scores(case, name):
    handle, _ = run(case, name, rows=zoo.BATCH)
    checked = 0
    for stage in handle.last.stages:
        for image, (scores, kept) in enumerate(zip(stage.scores, stage.kept, strict=True)):
            for numbers in compared(handle.last, stage, image):
                own, stays = scores[numbers], torch.isin(numbers, kept)
                goes = ~stays & ~own.isnan()
                if stays.any() and goes.any():
                    assert own[stays].min() >= own[goes].max()
                    checked += 1
    assert checked


def test_tokens_that_are_gone_or_were_not_ranked_have_no_score():
    handle, _ = run(PLAIN, "pyramiddrop")
    first, second = handle.last.stages
    scored = (~second.scores[0].isnan()).nonzero()[:, 0]
    assert torch.equal(scored, first.kept[0])
    assert not first.scores[0].isnan().any()
    assert handle.last.scores[0] is second.scores[0]

    handle, _ = run(TILES, "cls_topk")  # newlines do not compete
    (scores,) = handle.last.scores
    newlines = handle.last.tilings[0].newlines(scores.device)
    assert len(newlines)
    assert torch.equal(scores.isnan().nonzero()[:, 0], newlines)


def test_rows_that_stand_for_no_token_have_no_place_among_the_scores():
    handle, _ = run(PLAIN, "sparsevlm", keep_ratio=0.5)
    first, second = handle.last.stages
    assert (first.order[0] < 0).any()
    scored = (~second.scores[0].isnan()).nonzero()[:, 0]
    assert torch.equal(scored, first.kept[0])


def test_two_methods_have_the_scores_of_the_last_that_ranks():
    model = PLAIN.model()
    methods = [
        vlmprune.method("cls_topk", keep_ratio=0.7),
        vlmprune.method("fastv", keep_ratio=0.3),
    ]
    handle = vlmprune.patch(model, methods, record=True)
    model.generate(**PLAIN.inputs(), max_new_tokens=2, do_sample=False)
    before, inside = handle.last.stages
    assert inside.method == "fastv" and not before.scores[0].isnan().any()
    assert torch.equal(handle.last.scores[0].isnan(), inside.scores[0].isnan())


def test_nothing_is_kept_unless_asked_for():
    handle, _ = run(PLAIN, "cls_topk", record=False)
    assert handle.last.stages[0].scores is None
    with pytest.raises(vlmprune.NotRecordedError, match=r"patch\(\.\.\., record=True\)"):
        _ = handle.last.scores


def test_record_is_a_switch():
    with pytest.raises(vlmprune.MethodFieldError, match="record='yes'"):
        vlmprune.patch(PLAIN.model(), "cls_topk", keep_ratio=0.5, record="yes")
