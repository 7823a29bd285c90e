"""An image is what the user gave: tiles that only the prompt tells apart are put together."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
import vlmprune
from kit import zoo
from kit.beside_oracle import check_against
from kit.reported import truth_of
from PIL import Image
from vlmprune.adapters.family import IMAGE
from vlmprune.adapters.registry import family_of

TILED = pytest.mark.parametrize(
    "case",
    [
        case
        for name, case in zoo.CASES.items()
        if name in ("internvl", "idefics3", "smolvlm", "cohere2_vision", "ovis2")
    ],
    ids=lambda c: c.name,
)
ROWS = ((3, "A", "B", 5), (2, "D", 4), (9,))
"""Images of 3, 1 and 2 tiles, two of them side by side."""


def parts(case, inputs):
    return family_of(case.reference()).call(IMAGE, inputs).parts


@TILED
def test_tiles_of_one_image_share_its_budget(case):
    model, inputs = case.model(), case.inputs(ROWS)
    assert parts(case, inputs) == (3, 1, 2)
    with vlmprune.patch(model, "divprune", keep_tokens=7) as handle:
        model(**inputs)
        assert handle.last.tokens_in == [27, 9, 18] and handle.last.tokens_kept == [7, 7, 7]
        assert handle.last.tilings == case.tilings(ROWS)
        with handle.budget(keep_tokens=[20, None, 2]):
            model(**inputs)
            assert handle.last.tokens_kept == [20, 9, 2]
            check_against(truth_of(case, inputs, model, handle), model, inputs, handle)


def test_visionzip_has_no_cls_row_where_the_projector_merges_patches():
    """CLS has no neighbours to be merged with."""
    case = zoo.CASES["internvl"]
    model, inputs = case.model(), case.inputs(ROWS)
    handle = vlmprune.patch(model, "visionzip", keep_ratio=0.4)
    model(**inputs)
    assert all(order is None or (order >= 0).all() for order in handle.last.order)
    check_against(truth_of(case, inputs, model, handle), model, inputs, handle)


@TILED
def test_embeddings_in_place_of_ids_tell_images_apart_as_ids_do(case):
    model, inputs = case.model(), case.inputs(ROWS)
    embeds = {**inputs, "inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    del embeds["input_ids"]
    with vlmprune.patch(model, "divprune", keep_ratio=0.4) as handle:
        expected, last = model(**inputs).logits, handle.last
        assert torch.equal(model(**embeds).logits, expected)
        assert handle.last.tilings == last.tilings
        tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)
        given = model.generate(**embeds, max_new_tokens=3, do_sample=False)
        assert torch.equal(given, tokens[:, -3:]) and handle.last.tilings == last.tilings


@TILED
def test_encoded_alone_each_tile_is_an_image(case):
    """Nobody says which tiles belong together."""
    model, inputs = case.model(), case.inputs(ROWS)
    with vlmprune.patch(model, "divprune", keep_tokens=4) as handle:
        images = model.base_model.get_image_features(**zoo.encoder_inputs(inputs)["image"])
        text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        model(**text, mm_encoder_outputs={"image": images})
        assert handle.last.tokens_kept == [4] * 6


@TILED
def test_prompts_with_room_for_other_tiles_are_refused(case):
    model, inputs = case.model(), case.inputs(((3, "A", 5),))
    other = case.inputs(((3, "C", 5),))["input_ids"]
    with (
        vlmprune.patch(model, "divprune", keep_ratio=0.5),
        pytest.raises(vlmprune.UnsupportedFeatureError, match="do not belong together"),
    ):
        model(**{**inputs, "input_ids": other, "attention_mask": None})


@TILED
def test_threads_that_share_a_model_group_their_own_tiles(case):
    model, found = case.model(), {}
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.5)

    def ask(rows):
        for _ in range(5):
            model(**case.inputs((rows,)))
            found.setdefault(rows, set()).add(tuple(handle.last.tokens_in))

    threads = [threading.Thread(target=ask, args=(rows,)) for rows in (*ROWS[:2], (1, "C", 1))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {ROWS[0]: {(27, 9)}, ROWS[1]: {(18,)}, (1, "C", 1): {(36,)}}


@TILED
def test_crops_are_drawn_without_the_picture_which_is_under_the_thumbnail(case):
    model = case.model()
    with vlmprune.patch(model, "divprune", keep_ratio=0.5) as handle:
        model(**case.inputs(((3, "A", 5),)))
    red = Image.new("RGB", (48, 48), "red")
    sheet = handle.overlay(red)
    width = sheet.width // 3
    pixels = np.asarray(sheet)
    panels = [pixels[:, n * width : (n + 1) * width] for n in range(3)]
    reds = [int((panel == (255, 0, 0)).all(-1).sum()) for panel in panels]
    whole = case.tiling("A").thumbnail
    assert [count > 100 for count in reds] == [number == whole for number in range(3)]
    assert sum(reds) == reds[whole]
    assert handle.overlay([red] * 3).size == sheet.size


NAMED = pytest.mark.parametrize("name", ["idefics3", "smolvlm"])


@NAMED
def test_the_mark_that_ends_an_image_must_be_there(name):
    """It tells tiles of one image from those of two."""
    case, model = zoo.CASES[name], zoo.CASES[name].model()
    inputs = case.inputs(((3, "A"),))
    cut = {k: inputs[k][:, :-2] for k in ("input_ids", "attention_mask")}  # mark and closing word
    with (
        vlmprune.patch(model, "divprune", keep_ratio=0.5),
        pytest.raises(vlmprune.UnsupportedFeatureError, match="ends images"),
    ):
        model(**{**inputs, **cut})


@NAMED
def test_a_tile_of_zeros_is_padding_to_the_model_and_refused_here(name):
    """transformers itself has no tokens for it."""
    case, model = zoo.CASES[name], zoo.CASES[name].model()
    inputs = case.inputs(((3, "A", 4),))
    inputs["pixel_values"][0, 1] = 0
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        case.reference()(**inputs)
    with (
        vlmprune.patch(model, "divprune", keep_ratio=0.5),
        pytest.raises(vlmprune.UnsupportedFeatureError, match="tiles of zeros"),
    ):
        model(**inputs)


@TILED
def test_images_of_the_real_processor_are_told_apart(case):
    """Tiles, rows of tiles and neighbours, in the processor's own words."""
    family = zoo.OF_TESTS[case.name]
    mark = family.MARKS["image_token"]
    pictures = [Image.radial_gradient("L").resize(size) for size in ((72, 48), (72, 72), (24, 24))]
    inputs = family.processor()(
        text=[f"w5 {mark}{mark} w6", f"w7 w8 {mark} w9"],
        images=[
            [picture.convert("RGB") for picture in own] for own in (pictures[:2], pictures[2:])
        ],
        padding=True,
        return_tensors="pt",
    )
    crops = (6, 9, 9) if case.name in ("idefics3", "smolvlm") else (6, 4, 0)
    assert parts(case, inputs) == tuple(n + 1 for n in crops)  # and the whole picture


def test_frames_of_a_video_are_images_of_one_tile():
    """Nothing that reaches the model says that they are one video."""
    family, case = zoo.OF_TESTS["internvl"], zoo.CASES["internvl"]
    clip = np.random.default_rng(0).integers(0, 255, (4, 24, 24, 3)).astype(np.uint8)
    words = {"text": ["w5 <video> w6"], "videos": [clip]}
    assert parts(case, family.processor()(**words, return_tensors="pt")) == (1, 1, 1, 1)


@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_pixels_that_are_padding_make_another_image(name):
    """Of a remembered image the mask counts like the pixels."""
    case, model = zoo.CASES[name], zoo.CASES[name].model()
    inputs = case.inputs(((3, "A", 4),))
    masked = {**inputs, "pixel_attention_mask": inputs["pixel_attention_mask"].clone()}
    masked["pixel_attention_mask"][0, 1, 12:] = 0
    with vlmprune.patch(model, "divprune", keep_ratio=0.5, remember_images=4) as handle:
        first = model(**inputs).logits
        second = model(**masked).logits
        assert handle.remembered.misses == 2 and not torch.equal(first, second)
        assert torch.equal(model(**masked).logits, second) and handle.remembered.hits == 1
    with vlmprune.patch(model, "divprune", keep_ratio=0.5):
        assert torch.equal(model(**masked).logits, second)


@pytest.mark.parametrize("how", ["st_argmax", "gumbel_argmax"])
def test_tokens_that_are_one_visual_word_are_refused(how):
    model = zoo.CASES["ovis2"].model()
    model.base_model.vision_tower.config.tokenize_function = how
    with pytest.raises(vlmprune.UnsupportedModelError, match='tokenize_function = "softmax"'):
        vlmprune.patch(model, "divprune", keep_ratio=0.5)


@TILED
def test_images_of_several_tiles_are_remembered(case):
    """Whatever the encoder's entries are: tiles, or all that a prompt shows."""
    model, inputs = case.model(), case.inputs(ROWS)
    with vlmprune.patch(model, "divprune", keep_ratio=0.4):
        expected = model(**inputs).logits
    with vlmprune.patch(model, "divprune", keep_ratio=0.4, remember_images=4) as handle:
        found = [model(**inputs).logits for _ in range(2)]
        assert (handle.remembered.misses, handle.remembered.hits) == (3, 3)
    for logits in found:
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
