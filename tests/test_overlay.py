"""The picture of kept tokens shows the right places."""

import pytest
import torch
from PIL import Image
from vlmprune.adapters.overlay import overlay
from vlmprune.prune.tiling import Block, Tiling


def stripes(width: int, height: int) -> Image.Image:
    """Left half red, right half green."""
    image = Image.new("RGB", (width, height), (200, 30, 30))
    image.paste((30, 200, 30), (width // 2, 0, width, height))
    return image


def cell(picture: Image.Image, grid: tuple[int, int], index: int) -> tuple[int, int, int]:
    """Colour in the middle of a token."""
    rows, columns = grid
    x = (index % columns + 0.5) * picture.width / columns
    y = (index // columns + 0.5) * picture.height / rows
    return picture.getpixel((round(x), round(y)))


@pytest.mark.parametrize("fit", ["crop", "stretch"])
@pytest.mark.parametrize("grid", [(4, 4), (2, 6)])
def test_kept_tokens_keep_their_colour_and_dropped_ones_turn_grey(grid, fit):
    rows, columns = grid
    kept = torch.tensor([1, columns - 1, rows * columns - 1])
    picture = overlay([stripes(100 * columns, 100 * rows)], Tiling.single(*grid), kept, fit)
    assert min(picture.size) >= 448 - max(grid)
    for index in range(rows * columns):
        red, green, blue = cell(picture, grid, index)
        if index in kept.tolist():
            left = index % columns < columns // 2
            assert (red > 150) == left and (green > 150) != left
        else:
            assert red == green == blue


def test_cropping_shows_the_centre_and_stretching_all_of_it():
    wide = Image.new("RGB", (300, 100), (200, 30, 30))
    wide.paste((30, 200, 30), (100, 0, 200, 100))  # the middle third
    everything = torch.arange(9)
    cropped = overlay([wide], Tiling.single(3, 3), everything, "crop")
    stretched = overlay([wide], Tiling.single(3, 3), everything, "stretch")
    assert cropped.width == cropped.height and stretched.width > stretched.height
    assert [cell(cropped, (3, 3), i)[1] > 150 for i in range(3)] == [True, True, True]
    assert [cell(stretched, (3, 3), i)[1] > 150 for i in range(3)] == [False, True, False]


def test_thumbnail_and_canvas_are_two_panels_and_newlines_none_of_their_tokens():
    tiling = Tiling((Block((2,), (2,)), Block((2, 2), (2, 2), "rows")))
    # Thumbnail 0..3; canvas rows of 4 patches and a newline: 4..8, 9..13, ...
    kept = torch.tensor([0, 5, 8, 23])
    picture = overlay([stripes(600, 600)], tiling, kept, "stretch")
    thumbnail = picture.crop((0, 0, 600, 600))
    canvas = picture.crop((picture.width - 600, 0, picture.width, 600))
    coloured = [i for i in range(4) if len(set(cell(thumbnail, (2, 2), i))) > 1]
    assert coloured == [0]
    coloured = [i for i in range(16) if len(set(cell(canvas, (4, 4), i))) > 1]
    assert coloured == [1]


def test_a_panel_a_frame():
    tiling = Tiling((Block((2,), (2,)), Block((2,), (2,), "end")))
    frames = [Image.new("RGB", (500, 500), colour) for colour in ("red", "blue")]
    picture = overlay(frames, tiling, torch.tensor([0, 5]), "stretch")
    assert picture.getpixel((125, 125)) == (255, 0, 0)
    assert picture.getpixel((picture.width - 125, 125)) == (0, 0, 255)
    with pytest.raises(ValueError, match="one per frame"):
        overlay(frames * 2, tiling, torch.tensor([0]), "stretch")
