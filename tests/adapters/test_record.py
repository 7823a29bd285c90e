"""What `handle.last` and `handle.overlay` show beside the kept tokens: scores
(`patch(..., record=True)`), cuts one by one, and what is left in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import vlmprune
from kit import zoo
from PIL import Image
from vlmprune.prune.contract import CacheMethod
from vlmprune.prune.registry import method_class

TOP = ("cls_topk", "vtc_cls", "fopru", "fastv", "pyramiddrop", "spatten", "transprune")
"""Methods that keep the largest scores, and nothing else."""
PLAIN, TILES = zoo.CASES["llava-clip-llama"], zoo.CASES["llava_next"]
"""One tile of a few tokens; a thumbnail, tiles and newlines."""


def run(case, name, *, rows=zoo.SINGLE, record=True, **options):
    model = case.model()
    options = zoo.budget(name, keep_ratio=0.3) | options
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


# --- the KV cache ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["visual_press", "elastic_cache"])
def test_what_is_left_in_the_cache_is_told_by_layer_and_token(name):
    handle, _ = run(PLAIN, name, rows=zoo.BATCH, keep_ratio=0.5)
    last = handle.last
    assert last.tokens_kept == last.tokens_in
    visual = [
        sum(t for t, s in zip(last.tokens_in, last.image_sample, strict=True) if s == sample)
        for sample in range(len(zoo.BATCH))
    ]
    for sample, layers in enumerate(last.cache_kept):
        assert len(layers) == last.num_layers
        for layer, left in enumerate(layers):
            entries = last.entries[layer][sample]
            if entries is None:
                assert left == visual[sample]
            else:
                assert 0 < left < visual[sample]
                assert left >= entries.shape[-1] - last.text_tokens[sample]
                assert name != "visual_press" or left == sum(
                    round(t / 2)
                    for t, s in zip(last.tokens_in, last.image_sample, strict=True)
                    if s == sample
                )
    for image, tokens in enumerate(last.tokens_in):
        stored = last.cache.stored(image)
        assert stored.shape == (tokens,) and stored.min() >= 0 and stored.max() <= last.num_layers
        of_layers = [last.cache.stored(image, layer) for layer in range(last.num_layers)]
        assert torch.allclose(sum(of_layers), stored)
    assert "cache" in repr(last) and "per layer" in repr(last)


def test_the_tokens_that_a_press_left_are_those_with_the_highest_scores():
    handle, _ = run(PLAIN, "visual_press", press="received", keep_ratio=0.4)
    last = handle.last
    for layer in range(last.num_layers):
        stored, scores = last.cache.stored(0, layer), last.cache.ranked(0, layer)
        assert set(stored.tolist()) == {0.0, 1.0}  # this press ranks alike in all heads
        assert scores[stored == 1].min() >= scores[stored == 0].max()
    layers = [last.cache.ranked(0, layer) for layer in range(last.num_layers)]
    assert torch.allclose(last.scores[0], torch.stack(layers).mean(0))


def test_a_token_that_was_cut_before_is_in_no_cache():
    methods = [
        vlmprune.method("cls_topk", keep_ratio=0.7),
        vlmprune.method("visual_press", press="received", keep_ratio=0.3),
    ]
    model = PLAIN.model()
    handle = vlmprune.patch(model, methods, record=True)
    model.generate(**PLAIN.inputs(zoo.BATCH), max_new_tokens=2, do_sample=False)
    for image, kept in enumerate(handle.last.kept):
        stored = handle.last.cache.stored(image)
        assert torch.equal((~stored.isnan()).nonzero()[:, 0], kept)
        ranked = handle.last.cache.ranked(image)
        assert ranked is None or torch.equal((~ranked.isnan()).nonzero()[:, 0], kept)


def test_without_a_method_on_the_cache_nothing_is_said_of_it():
    handle, _ = run(PLAIN, "cls_topk")
    assert handle.last.cache is None and handle.last.cache_kept is None
    assert "cache" not in repr(handle.last)


# --- handle.overlay ----------------------------------------------------------------------------


def picture() -> Image.Image:
    return Image.new("RGB", (60, 60), (250, 200, 150))


def coloured(shown: Image.Image, case) -> list[int]:
    """The tokens of a plain image that are shown as they are."""
    rows, columns = case.grid("A")
    width, height = shown.width / columns, shown.height / rows
    return [
        token
        for token in range(rows * columns)
        if shown.getpixel(
            (int((token % columns + 0.5) * width), int((token // columns + 0.5) * height))
        )
        == (250, 200, 150)
    ]


def test_a_stage_shows_what_was_alive_after_that_cut():
    handle, _ = run(PLAIN, "pyramiddrop", keep_ratio=0.2)
    stages = handle.last.stages
    assert len(stages) == 3 and len(stages[0].kept[0]) > len(stages[-1].kept[0])
    for number, stage in enumerate(stages):
        assert coloured(handle.overlay(picture(), stage=number), PLAIN) == stage.kept[0].tolist()
    assert handle.overlay(picture()) == handle.overlay(picture(), stage=2)


def test_a_stage_shows_what_had_been_merged_by_then():
    handle, _ = run(PLAIN, "sparsevlm", keep_ratio=0.3)
    *_, before, after = range(len(handle.last.stages))
    assert handle.overlay(picture(), stage=after) == handle.overlay(picture())
    assert handle.overlay(picture(), stage=before) != handle.overlay(picture(), stage=after)


@pytest.mark.parametrize(("name", "options"), [("fastv", {}), ("cls_topk", {})])
def test_scores_are_a_heat_map_with_a_scale(name, options):
    handle, _ = run(PLAIN, name, **options)
    plain, heat = handle.overlay(picture()), handle.overlay(picture(), scores=True)
    assert heat.height > plain.height and heat.width == plain.width
    assert not coloured(heat.crop((0, 0, *plain.size)), PLAIN)
    assert handle.overlay(picture(), scores=True, stage=0) == heat


def test_a_cache_is_a_heat_map_of_layers_and_one_layer_another():
    handle, _ = run(PLAIN, "visual_press", keep_ratio=0.3)
    everything = handle.overlay(picture())
    layers = [handle.overlay(picture(), layer=layer) for layer in range(handle.last.num_layers)]
    assert all(one != everything and one.size == everything.size for one in layers)
    assert len({one.tobytes() for one in layers}) > 1
    assert handle.overlay(picture(), scores=True, layer=1) != handle.overlay(picture(), layer=1)
    assert handle.overlay(picture(), scores=True) != everything


@pytest.mark.parametrize(
    ("name", "asked", "says"),
    [
        ("fastv", {"index": 3}, "index=3: the last prefill had 1 images"),
        ("fastv", {"stage": 1}, r"stage=1 is no cut: .* 0 \(fastv at layer 2\)"),
        ("fastv", {"stage": -1}, "stage=-1 is no cut"),
        ("fastv", {"layer": 1}, "layer=1: no method on the KV cache"),
        ("divprune", {"scores": True}, "divprune picks each token by its distance"),
        ("random", {"scores": True, "stage": 0}, "random draws tokens by chance"),
        ("visual_press", {"layer": 99}, r"layer=99 is no decoder layer: use 0\.\.3"),
        ("visual_press", {"stage": 0}, "made no cut; leave stage out"),
    ],
)
def test_what_there_is_not_is_refused_with_what_there_is(name, asked, says):
    handle, _ = run(PLAIN, name)
    with pytest.raises(vlmprune.NothingToShowError, match=says):
        handle.overlay(picture(), **asked)


@pytest.mark.parametrize("image", ["cat.jpg", Path("cat.jpg"), ["cat.jpg"]])
def test_a_file_is_no_picture_and_the_error_says_what_to_write(image):
    handle, _ = run(PLAIN, "divprune")
    with pytest.raises(vlmprune.MethodFieldError, match=r"image=.*cat.jpg.* Image\.open\("):
        handle.overlay(image)


def test_stage_and_layer_are_two_questions():
    handle, _ = run(PLAIN, "visual_press")
    with pytest.raises(vlmprune.MethodFieldError, match="cannot be given together"):
        handle.overlay(picture(), stage=0, layer=0)


def test_scores_that_were_not_recorded_are_said_to_be_so():
    handle, _ = run(PLAIN, "fastv", record=False)
    with pytest.raises(vlmprune.NotRecordedError, match="record=True"):
        handle.overlay(picture(), scores=True)


# --- what else a patch may do ------------------------------------------------------------------


def test_a_remembered_image_has_its_scores():
    model = PLAIN.model()
    handle = vlmprune.patch(model, "cls_topk", keep_ratio=0.3, record=True, remember_images=2)
    seen = []
    for _ in range(2):
        model.generate(**PLAIN.inputs(), max_new_tokens=1, do_sample=False)
        seen.append(handle.last.scores[0])
    assert handle.remembered.hits == 1
    assert torch.equal(seen[0], seen[1])


def test_a_generate_without_a_cache_reports_the_scores_of_its_one_choice():
    model = PLAIN.model()
    handle = vlmprune.patch(model, "fastv", keep_ratio=0.3, record=True)
    model.generate(**PLAIN.inputs(), max_new_tokens=1, do_sample=False)
    first = handle.last.scores[0]
    model.generate(**PLAIN.inputs(), max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(first.isnan(), handle.last.scores[0].isnan())
    assert torch.allclose(first, handle.last.scores[0], equal_nan=True, atol=1e-6)


def test_frames_of_a_video_have_a_heat_map_each():
    case = zoo.CASES["qwen2_vl"]
    handle, _ = run(case, "cls_topk", rows=zoo.MIXED)
    last = handle.last
    (video, *_) = (n for n, tiling in enumerate(last.tilings) if len(tiling.blocks) > 1)
    frames = [picture() for _ in last.tilings[video].blocks]
    heat = handle.overlay(frames, video, scores=True)
    plain = handle.overlay(frames, video)
    assert heat.width == plain.width and heat.height > plain.height
    assert handle.overlay(frames, video, across=1).height > plain.height
