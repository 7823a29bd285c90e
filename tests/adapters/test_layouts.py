"""Where the tokens of tiled images lie: what is written down or computed from sizes is what the
models' own packing does, seen by sending numbers through it instead of features."""

from __future__ import annotations

import copy
import functools
import math

import numpy as np
import pytest
import torch
import vlmprune
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from kit import zoo
from kit.oracle import Rows
from kit.reported import truth_of
from PIL import Image
from transformers import (
    LlavaNextImageProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionVideoProcessor,
)
from vlmprune.adapters.family import IMAGE, VIDEO, Call
from vlmprune.adapters.registry import family_of
from vlmprune.prune.tiling import Block, Tiling

TILED = [case for case in zoo.CASES.values() if isinstance(case.layout, zoo.Tiles)]
TILED_CASES = pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
CPU = torch.device("cpu")


def packed(core, values, size, newline, ratio: str | None = None) -> torch.Tensor:
    """Values (tiles, patches, width) of one image through the model's own packing: (N, width)."""
    options = {}
    if hasattr(core.config, "vision_aspect_ratio"):
        options["vision_aspect_ratio"] = ratio or core.config.vision_aspect_ratio
    else:
        options["vision_feature_select_strategy"] = core.config.vision_feature_select_strategy
    sizes = torch.tensor([size])
    return core.pack_image_features([values], sizes, image_newline=newline, **options)[0][0]


def check_tiling(tiling: Tiling, core, size) -> None:
    """Each token is a newline where the packing puts one, and belongs to its tile: all of it where
    patches enter as they are, most of it where the canvas is scaled."""
    count = sum(len(block.row_sizes) * len(block.column_sizes) for block in tiling.blocks)
    side = zoo.SIDE
    tile = torch.eye(count)[:, None].expand(-1, side * side, -1)
    patch = torch.arange(side * side, dtype=torch.float32).view(1, -1, 1).expand(count, -1, -1)
    values = torch.cat([tile, patch], -1)
    newline = torch.full((count + 1,), -1.0)
    tokens = packed(core, values, size, newline)
    scaled = len(tokens) != len(packed(core, values, size, newline, "anyres_max_999"))
    assert len(tokens) == tiling.num_tokens
    is_newline = (tokens < 0).all(-1)
    assert is_newline.nonzero()[:, 0].tolist() == tiling.newlines(CPU).tolist()
    patches = tokens[tiling.patches(CPU)]
    found = set()
    for spec, members in zip(tiling.tiles, tiling.tile_patches(CPU), strict=True):
        here = patches[members]
        found |= set(members.tolist())
        shares = here[:, :-1]
        if scaled:
            assert (shares[:, spec.picture] >= shares.max(-1).values - 1e-4).all()
        else:
            assert (shares[:, spec.picture] == 1).all()
            numbers = here[:, -1].long().view(spec.rows, spec.columns)
            assert (numbers.diff(dim=0) == side).all() and (numbers.diff(dim=1) == 1).all()
    assert found == set(range(tiling.num_patches))


@TILED_CASES
@pytest.mark.parametrize("image", "ABCD")
def test_the_tilings_of_the_zoo(case, image):
    size, canvas = case.layout.images[image]
    check_tiling(case.tiling(image), case.reference().model, size)
    assert case.tiling(image).blocks[1] == canvas


def images_of(case, kind: str, inputs, pooled) -> list[torch.Tensor]:
    """What the encoder gave, image by image."""
    family = family_of(case.reference())
    return family.images(family.call({"image": IMAGE, "video": VIDEO}[kind], inputs), pooled)


@pytest.mark.parametrize("case", zoo.CASES.values(), ids=zoo.CASES)
def test_the_zoo_has_as_many_placeholders_as_features(case):
    rows = zoo.BATCH + (case.layout.videos if case.layout.takes_videos else ((2, "D", 1),))
    inputs = case.inputs(rows)
    found = {}
    for kind, given_inputs in zoo.encoder_inputs(inputs).items():
        encode = getattr(case.reference().model, f"get_{kind}_features")
        pooled = encode(**given_inputs, return_dict=True).pooler_output
        found[kind] = iter([len(image) for image in images_of(case, kind, inputs, pooled)])
    for name, count in zip(zoo.images(rows), case.counts(rows), strict=True):
        assert next(found["video" if name in zoo.FRAMES else "image"]) == count


def test_the_zoo_covers_the_ways_to_cut_a_canvas():
    """Rows and columns cut away, tiles of unequal sizes, nothing cut, scaled canvases."""
    canvases = {c.name: {i: c.tiling(i).blocks[1] for i in "ABCD"} for c in TILED}
    full = {"llava_next": "D"}
    for name, blocks in canvases.items():
        grids = {(len(block.row_sizes), len(block.column_sizes)) for block in blocks.values()}
        assert len(grids) >= 3, name
        sizes = [set(b.row_sizes) | set(b.column_sizes) for b in blocks.values()]
        assert any(len(s) > 1 for s in sizes), name
    for name, image in full.items():
        assert set(canvases[name][image].row_sizes) == {zoo.SIDE}


def test_the_inputs_of_the_zoo_have_the_shapes_that_processors_give():
    next_case, onevision = zoo.CASES["llava_next"], zoo.CASES["llava_onevision"]

    def picture(case, name):
        height, width = case.layout.images[name][0]
        return Image.new("RGB", (width, height))

    side = {"height": zoo.PIXELS, "width": zoo.PIXELS}
    processor = LlavaNextImageProcessor(
        size={"shortest_edge": zoo.PIXELS}, crop_size=side, image_grid_pinpoints=zoo.PINPOINTS
    )
    pictures = [picture(next_case, name) for name in zoo.images(zoo.BATCH)]
    shapes(processor(pictures, return_tensors="pt"), next_case.inputs(zoo.BATCH))

    processor = LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=zoo.PINPOINTS)
    nested = [[picture(onevision, name) for name in zoo.images([row])] for row in zoo.BATCH]
    shapes(processor(nested, return_tensors="pt"), onevision.inputs(zoo.BATCH))

    processor = LlavaOnevisionVideoProcessor(size=side)
    frames = np.zeros((zoo.FRAMES["V"], 30, 40, 3), dtype=np.uint8)
    videos = onevision.inputs(((2, "V"), (1, "W", 3)))
    shapes(processor([frames, frames], return_tensors="pt"), videos)


def shapes(of_processor, of_zoo) -> None:
    """Same shapes, and the same values of what is no pixel."""
    names = {key for key in of_zoo if key not in ("input_ids", "attention_mask")}
    assert set(of_processor) == names
    for name in names:
        found, expected = torch.as_tensor(of_processor[name]), of_zoo[name]
        assert found.shape == expected.shape, name
        assert "pixel" in name or torch.equal(found, expected), name


# --- The adapters' tilings ---------------------------------------------------------------------


@functools.cache
def stub(name: str):
    """A model whose configuration a test may change."""
    case = zoo.CASES[name]
    model = case.model()
    model.config = model.model.config = copy.deepcopy(model.config)
    return model


def adapter_tilings(model, modality, inputs) -> list[Tiling]:
    found = family_of(model)
    features = [torch.zeros(0)] * len(inputs.get("image_sizes", inputs.get("pixel_values_videos")))
    return list(found.tilings(Call(modality, inputs), features))


sides = st.integers(1, 5)


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@given(
    sizes=st.lists(st.tuples(st.integers(8, 400), st.integers(8, 400)), min_size=1, max_size=3),
    pinpoints=st.lists(st.tuples(sides, sides), min_size=1, max_size=6, unique=True),
    ratio=st.integers(1, 9),
)
@settings(max_examples=150)
def test_the_adapters_tilings_are_what_the_model_packs(name, sizes, pinpoints, ratio):
    assume(all(0.05 < height / width < 20 for height, width in sizes))
    model = stub(name)
    model.config.image_grid_pinpoints = [[zoo.PIXELS * r, zoo.PIXELS * c] for r, c in pinpoints]
    if name == "llava_onevision":
        model.config.vision_aspect_ratio = f"anyres_max_{ratio}"
    try:
        for size in sizes:
            blank = torch.zeros(26, zoo.SIDE**2, 1)
            packed(model.model, blank[: _tiles_of(model, size)], size, torch.zeros(1))
    except (RuntimeError, ValueError, ZeroDivisionError):
        assume(False)  # the model itself cannot pack it: all padding, or nothing left of a row
    inputs = {"image_sizes": torch.tensor(sizes)}
    inputs["pixel_values"] = torch.zeros(len(sizes), 1, 3, zoo.PIXELS, zoo.PIXELS)
    for size, tiling in zip(sizes, adapter_tilings(model, IMAGE, inputs), strict=True):
        assert tiling.blocks[0] == Block((zoo.SIDE,), (zoo.SIDE,))
        check_tiling(tiling, model.model, size)


def _tiles_of(model, size) -> int:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    return image_size_to_num_patches(size, model.config.image_grid_pinpoints, zoo.PIXELS)


def test_images_that_are_not_alone_are_one_square_and_a_newline():
    model, case = zoo.CASES["llava_onevision"].reference(), zoo.CASES["llava_onevision"]
    rows = ((3, "A", "B", 2), (2, "C"), (2, "D", 1, "C", "A", 2))
    given_inputs = zoo.encoder_inputs(case.inputs(rows))["image"]
    assert adapter_tilings(model, IMAGE, given_inputs) == case.tilings(rows)
    del given_inputs["batch_num_images"]  # transformers takes every image for a single one then
    alone = [case.tiling(name) for name in zoo.images(rows)]
    assert adapter_tilings(model, IMAGE, given_inputs) == alone


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_videos_are_a_block_a_frame_and_a_newline(frames):
    model = zoo.CASES["llava_onevision"].reference()
    pixels = torch.zeros(2, frames, 3, zoo.PIXELS, zoo.PIXELS)
    tiling, same = adapter_tilings(model, VIDEO, {"pixel_values_videos": pixels})
    assert tiling == same
    assert len(tiling.blocks) == frames == len(tiling.tiles)
    assert tiling.newlines(CPU).tolist() == [tiling.num_tokens - 1]
    features = model.model.get_video_features(pixels, return_dict=True).pooler_output
    assert features.shape[1] == tiling.num_tokens


def test_frames_with_a_token_ahead_of_each():
    tiling = zoo.CASES["video_llava"].tiling("V")
    frame = zoo.SIDE**2 + 1
    assert tiling.num_tokens == 3 * frame and tiling.num_patches == 3 * (frame - 1)
    assert tiling.newlines(CPU).tolist() == [0, frame, 2 * frame]
    assert tiling.without_newlines().num_tokens == tiling.num_patches
    ends = Tiling((Block((2,), (3,), "rows", lead=1), Block((1,), (1,), "end")))
    assert ends.newlines(CPU).tolist() == [0, 4, 8, 10]


# --- Tiles of which nothing is left ------------------------------------------------------------


def test_the_tilings_without_some_tiles():
    for image in "ABC":
        check_tiling(
            zoo.GONE.tiling(image), zoo.GONE.reference().model, zoo.GONE.layout.images[image][0]
        )


@zoo.METHODS
def test_methods_on_tiles_of_which_nothing_is_left(name):
    """Scores and CLS features are those of the tiles that are left."""
    model, inputs = zoo.GONE.model(), zoo.GONE.inputs(zoo.BATCH)
    handle = zoo.patch_or_refusal(model, zoo.GONE, name, keep_ratio=0.3)
    if handle is None:
        return
    with torch.no_grad():
        logits = model(**inputs).logits
    assert handle.last.tilings == zoo.GONE.tilings(zoo.BATCH)
    assert handle.last.tokens_kept == [round(0.3 * count) for count in zoo.GONE.counts(zoo.BATCH)]
    truth = truth_of(zoo.GONE, inputs, model, handle)
    for b, row in enumerate(truth.rows):
        expected = truth.full_logits(b)
        torch.testing.assert_close(logits[b, row.columns], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", [*zoo.CASES.values(), zoo.GONE], ids=lambda case: case.name)
def test_the_pictures_that_the_encoder_saw(case):
    """All tiles, those of which nothing is left included, and all frames."""
    rows = case.layout.videos if case.layout.takes_videos else zoo.BATCH
    family, inputs, found = family_of(case.reference()), case.inputs(rows), {}
    side = zoo.SIDE // math.isqrt(case.shape.tower.merge_unit)
    for kind in zoo.encoder_inputs(inputs):
        modality = {"image": IMAGE, "video": VIDEO}[kind]
        found[kind] = iter(family.pictures(family.call(modality, inputs)))
    for name, tiling in zip(zoo.images(rows), case.tilings(rows), strict=True):
        seen = list(next(found["video" if name in zoo.FRAMES else "image"]))
        tiles = sum(len(block.row_sizes) * len(block.column_sizes) for block in tiling.blocks)
        if case.packed:
            _, height, width = zoo.PATCH_GRIDS[name]
            assert seen == [(height // 2, width // 2)] * tiles
        elif case.name in ("mistral3", "lfm2_vl", "gemma4"):  # of any size
            assert seen == [(block.rows, block.columns) for block in tiling.blocks]
        else:
            assert seen == [(side, side)] * tiles


def test_slots_of_rows():
    """Kept tokens' own places, and the first free ones for rows of no token."""
    assert Rows(torch.tensor([5, 2, -1, -1])).slots(7).tolist() == [0, 1, 2, 5]
    assert Rows(torch.tensor([-1, 0, 1])).slots(7).tolist() == [0, 1, 2]
    assert Rows(torch.tensor([3, 1])).slots(7).tolist() == [1, 3]


def test_a_patched_tiled_model_reports_its_tilings():
    for case in TILED:
        model = case.model()
        handle = vlmprune.patch(model, "random", keep_ratio=0.5)
        rows = ((2, "A"), (1, "B", 1), (3, "D", 2, "C"))
        model(**case.inputs(rows))
        assert handle.last.tilings == case.tilings(rows)
        assert handle.last.tokens_in == case.counts(rows)
