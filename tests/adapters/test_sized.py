"""LFM2-VL: pictures of any size, of which an image may have several, padded in a batch."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import zoo
from kit.beside_oracle import check_against
from kit.reported import truth_of
from vlmprune.adapters.family import IMAGE
from vlmprune.adapters.registry import family_of

CASE = zoo.CASES["lfm2_vl"]
ROWS = ((3, "A", "B", 5), (2, "D", 4), (9,))
"""Images of 3 pictures and of 1, two of them side by side."""
TILE = (3, 3)


def test_pictures_of_one_image_share_its_budget():
    model, inputs = CASE.model(), CASE.inputs(ROWS)
    assert family_of(model).call(IMAGE, inputs).parts == (3, 1, 1)
    with vlmprune.patch(model, "divprune", keep_tokens=7) as handle, torch.no_grad():
        model(**inputs)
        assert handle.last.tokens_in == [26, 15, 12] and handle.last.tokens_kept == [7, 7, 7]
        assert handle.last.tilings == CASE.tilings(ROWS)
        with handle.budget(keep_tokens=[20, None, 2]):
            model(**inputs)
            assert handle.last.tokens_kept == [20, 15, 2]
            check_against(truth_of(CASE, inputs, model, handle), model, inputs, handle)


def test_without_marks_pictures_side_by_side_are_of_one_image():
    model, inputs = CASE.model(), CASE.inputs((("A",),))
    ids = inputs["input_ids"][:, zoo.is_visual(inputs["input_ids"])[0]]
    ids = torch.cat([torch.tensor([[5]]), ids, torch.tensor([[6, 7]]), ids], 1)
    twice = {k: torch.cat([v, v]) for k, v in zoo.encoder_inputs(inputs)["image"].items()}
    assert family_of(model).call(IMAGE, {**twice, "input_ids": ids}).parts == (3, 3)


def test_encoded_alone_each_picture_is_an_image():
    """Nobody says which belong together."""
    model, inputs = CASE.model(), CASE.inputs(ROWS)
    with vlmprune.patch(model, "divprune", keep_tokens=4) as handle, torch.no_grad():
        images = model.base_model.get_image_features(**zoo.encoder_inputs(inputs)["image"])
        text = {k: inputs[k] for k in ("input_ids", "attention_mask")}
        model(**text, mm_encoder_outputs={"image": images})
        assert handle.last.tokens_kept == [4] * 5


@pytest.mark.parametrize(("prompt", "pictures"), [("C", "A"), ("A", "C"), ("B", "A")])
def test_prompts_with_room_for_other_pictures_are_refused(prompt, pictures):
    model, inputs = CASE.model(), CASE.inputs(((3, pictures, 5),))
    other = CASE.inputs(((3, prompt, 5),))["input_ids"]
    with (
        vlmprune.patch(model, "divprune", keep_ratio=0.5),
        pytest.raises(vlmprune.UnsupportedFeatureError, match="do not belong together"),
    ):
        model(**{**inputs, "input_ids": other, "attention_mask": None})


@pytest.mark.parametrize(
    ("grids", "thumbnail"),
    [
        ([(2, 4)], None),
        ([TILE, TILE, (2, 4)], 2),
        ([TILE] * 4 + [TILE], 4),  # of a square
        ([TILE] * 2, None),
        ([TILE] * 6, None),
    ],
)
def test_the_whole_picture_is_last_where_there_is_one(grids, thumbnail):
    model = CASE.model()
    tokens = sum(rows * columns for rows, columns in grids)
    given = {
        "spatial_shapes": 2 * torch.tensor(grids),
        "input_ids": torch.tensor([[5, *[zoo.IMAGE] * tokens, 6]]),
    }
    family = family_of(model)
    (tiling,) = family.tilings(family.call(IMAGE, given), ())
    assert tiling.thumbnail == thumbnail and len(tiling.blocks) == len(grids)


def test_what_a_picture_keeps_does_not_depend_on_larger_ones_beside_it():
    model, alone = CASE.model(), CASE.inputs(((3, "B", 5),))
    with torch.no_grad():
        handle = vlmprune.patch(model, "vispruner", keep_ratio=0.4, scores="received")
        model(**alone)
        kept = handle.last.kept[0]
        model(**CASE.inputs(((3, "B", 5), (2, "C", 3))))
        assert torch.equal(handle.last.kept[0], kept)


def test_the_width_of_mlps_is_that_of_their_layers():
    """A third less than configured, rounded up."""
    model = CASE.model()
    assert model.config.text_config.intermediate_size == 96
    assert family_of(model).shape.decoder.intermediate_size == 64
