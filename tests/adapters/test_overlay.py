"""The picture of kept tokens shows the right places."""

import colorsys

import pytest
import torch
from PIL import Image
from vlmprune.adapters.pictures.heat import heat_map
from vlmprune.adapters.pictures.overlay import overlay
from vlmprune.adapters.pictures.regions import Regions
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


def test_a_crop_is_framed_in_the_whole_picture_whose_rest_is_dim():
    wide = Image.new("RGB", (300, 100), (200, 30, 30))
    wide.paste((30, 200, 30), (100, 0, 200, 100))  # the middle third
    everything = torch.arange(9)
    cropped = overlay([wide], Tiling.single(3, 3), everything, "crop")
    stretched = overlay([wide], Tiling.single(3, 3), everything, "stretch")
    assert [cell(stretched, (3, 3), i)[1] > 150 for i in range(3)] == [False, True, False]
    assert abs(cropped.width / cropped.height - 3) < 0.05
    third = cropped.width // 3
    middle = cropped.crop((third, 0, 2 * third, cropped.height))
    assert all(cell(middle, (3, 3), i) == (30, 200, 30) for i in range(9))
    assert cropped.info["legend"] == ["Hatched: cut off, the model does not see it."]
    assert stretched.info["legend"] == []
    for left in (0, 2 * third):  # what the model does not see: still red, but pale, and hatched
        outside = cropped.crop((left + 10, 10, left + third - 10, cropped.height - 10))
        colours = {colour for _, colour in outside.getcolors(maxcolors=10**6)}
        assert len(colours) > 1
        assert all(red > 140 and min(green, blue) > 100 for red, green, blue in colours)
    frame = [cropped.getpixel((x, cropped.height // 2)) for x in range(third - 8, third + 8)]
    assert (0, 0, 0) in frame


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


def seen(picture, grid, index):
    """Every colour of a token."""
    rows, columns = grid
    width, height = picture.width // columns, picture.height // rows
    x, y = index % columns * width, index // columns * height
    colours = picture.crop((x, y, x + width, y + height)).getcolors(maxcolors=10**6)
    return {colour for _, colour in colours}


def corner(picture, grid, index):
    """The colour at a token's upper left."""
    rows, columns = grid
    x, y = index % columns * picture.width // columns, index // columns * picture.height // rows
    return picture.getpixel((x, y))


def test_cells_that_were_averaged_are_outlined_blocks_and_none_of_them_is_faded():
    """4 x 4 tokens in four rows of 2 x 2, each in the place of its first token."""
    grid, kept = (4, 4), torch.tensor([0, 2, 8, 10])
    blocks = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    members = torch.tensor([[row, token] for row, block in enumerate(blocks) for token in block]).T
    green = Image.new("RGB", (400, 400), (30, 200, 30))
    picture = overlay([green], Tiling.single(*grid), kept, "stretch", members=members)
    outlines = []
    for block in blocks:
        assert all(cell(picture, grid, token) == (30, 200, 30) for token in block)
        first, *others = block
        outlines.append(corner(picture, grid, first))
        assert all(outlines[-1] in seen(picture, grid, token) for token in others)
    assert len(set(outlines)) == 4
    assert (30, 200, 30) not in outlines and (255, 255, 255) not in outlines
    for one, two in ((0, 1), (0, 2), (1, 3), (2, 3)):  # neighbours are told apart
        assert sum(abs(a - b) for a, b in zip(outlines[one], outlines[two], strict=True)) > 200


def test_scattered_members_have_the_hue_of_their_row_and_dropped_tokens_none():
    """Row 0 is token 0; row 1 is token 5 with 7 and 10 merged into it; 1 and 2 went into a row that
    stands for no token; the others were dropped."""
    grid, kept = (3, 4), torch.tensor([0, 5])
    rows, members = torch.tensor([0, 5, -1]), torch.tensor([[1, 1, 1, 2, 2], [5, 7, 10, 1, 2]])
    grey = Image.new("RGB", (400, 300), (128, 128, 128))
    tiling = Tiling.single(*grid)
    picture = overlay([grey], tiling, kept, "stretch", rows=rows, members=members)
    grey, white, outlines = picture.info["legend"]
    assert grey.startswith("Grey") and white.startswith("White") and "merged" in outlines
    hue = corner(picture, grid, 5)
    assert corner(picture, grid, 7) == corner(picture, grid, 10) == hue
    assert cell(picture, grid, 7) == cell(picture, grid, 10) != (128, 128, 128)
    assert cell(picture, grid, 5) == (128, 128, 128), "the row's own token is bright"
    assert corner(picture, grid, 1) == corner(picture, grid, 2) != hue
    assert corner(picture, grid, 0) == (255, 255, 255)
    for token in (3, 4, 6, 8, 9, 11):
        assert len(seen(picture, grid, token)) == 1
        assert len(set(cell(picture, grid, token))) == 1


def test_a_token_that_many_rows_took_in_belongs_to_the_first_and_kept_ones_to_themselves():
    grid, kept = (1, 4), torch.tensor([0, 3])
    members = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 1, 3, 0, 1, 3]])
    picture = overlay([stripes(400, 100)], Tiling.single(*grid), kept, "stretch", members=members)
    assert corner(picture, grid, 1) == corner(picture, grid, 0) != corner(picture, grid, 3)


def test_a_row_of_one_token_is_no_region():
    kept, members = torch.tensor([0, 3]), torch.tensor([[0, 1], [0, 3]])
    tiling = Tiling.single(2, 2)
    plain = overlay([stripes(300, 300)], tiling, kept, "stretch")
    assert overlay([stripes(300, 300)], tiling, kept, "stretch", members=members) == plain


@pytest.mark.parametrize("grid", [(5, 7), (24, 24)])
def test_no_neighbours_have_nearly_the_same_hue(grid):
    """One region a token, the hardest case."""
    tiling = Tiling.single(*grid)
    everything = torch.arange(tiling.num_tokens)
    rows = torch.full_like(everything, -1)
    regions = Regions.of(tiling, everything[:0], rows, torch.stack([everything, everything]))
    hues = {row: colorsys.rgb_to_hsv(*color)[0] for row, color in regions.colors.items()}
    for token in range(tiling.num_tokens):
        beside = [token + 1] if (token + 1) % grid[1] else []
        below = [token + grid[1]] if token + grid[1] < tiling.num_tokens else []
        for other in beside + below:
            away = abs(hues[token] - hues[other])
            assert min(away, 1 - away) > 0.15


def test_regions_of_tiles_do_not_touch_across_blocks():
    tiling = Tiling((Block((2,), (2,)), Block((2,), (2,), "rows")))
    members = torch.tensor([[0, 0, 1, 1], [2, 3, 4, 5]])
    picture = overlay(
        [stripes(600, 600)],
        tiling,
        torch.tensor([0]),
        "stretch",
        rows=torch.tensor([-1, -1]),
        members=members,
    )
    assert picture.width == 2 * 600 + 12


HEAT = {"title": "attention"}


def strip_of(picture, of=448):
    """The colours of the scale below a picture of that height."""
    return [picture.getpixel((x, of + 20)) for x in range(0, 448, 7)]


def test_a_heat_map_colours_tokens_by_value_and_prints_the_scale():
    grid = (2, 2)
    values = torch.tensor([0.0, 1.0, 2.0, torch.nan])
    white = Image.new("RGB", (448, 448), "white")
    picture = heat_map([white], Tiling.single(*grid), values, "stretch", **HEAT)
    assert picture.width == 448 and picture.height > 448 + 40
    tokens = picture.crop((0, 0, 448, 448))
    low, middle, high, none = (cell(tokens, grid, i) for i in range(4))
    assert len(set(none)) == 1 and len({low, middle, high}) == 3
    assert high[0] > low[0] and high[1] > middle[1] > low[1]  # violet, green, yellow
    scale = strip_of(picture)
    assert len(set(scale)) > 30 and scale[0][1] < scale[32][1] < scale[-1][1]
    other = heat_map([white], Tiling.single(*grid), 7 * values, "stretch", **HEAT)
    below = (0, 470, 448, picture.height)
    assert tokens == other.crop((0, 0, 448, 448))
    assert picture.crop(below) != other.crop(below), "the numbers are printed"


def test_few_large_values_do_not_darken_the_rest():
    values = torch.tensor([*(0.001 * i for i in range(15)), 10.0])
    white = Image.new("RGB", (448, 448), "white")
    picture = heat_map([white], Tiling.single(4, 4), values, "stretch", **HEAT)
    tokens = picture.crop((0, 0, 448, 448))
    assert len({cell(tokens, (4, 4), i) for i in range(16)}) == 16
    fixed = heat_map([white], Tiling.single(4, 4), values, "stretch", limits=(0, 10), **HEAT)
    assert len({cell(fixed.crop((0, 0, 448, 448)), (4, 4), i) for i in range(16)}) < 5


def test_a_heat_map_lines_kept_tokens_and_has_a_panel_a_block():
    tiling = Tiling((Block((2,), (2,)), Block((24,), (24,), "rows")))
    values, kept = torch.rand(tiling.num_tokens), torch.tensor([1, 4])
    picture = heat_map([stripes(480, 480)], tiling, values, "stretch", kept=kept, **HEAT)
    left, right = picture.crop((0, 0, 480, 480)), picture.crop((492, 0, 972, 480))
    assert corner(left, (2, 2), 1) == (255, 255, 255) != corner(left, (2, 2), 0)
    assert corner(right, (24, 24), 0) == (255, 255, 255) != corner(right, (24, 24), 1)
    stacked = heat_map([stripes(480, 480)], tiling, values, "stretch", across=1, **HEAT)
    assert stacked.width == 480 and stacked.height > 480 + 12 + 480


def test_lines_around_kept_tokens_are_explained_under_the_scale():
    tiling, values = Tiling.single(2, 2), torch.arange(4.0)
    plain = heat_map([stripes(50, 50)], tiling, values, "stretch", **HEAT)
    lined = heat_map([stripes(50, 50)], tiling, values, "stretch", kept=torch.tensor([1]), **HEAT)
    below = lined.crop((0, plain.height, *lined.size))
    assert lined.height > plain.height and lined.width == plain.width
    assert min(low for low, _ in below.getextrema()) < 100  # dark letters on white


def test_equal_values_have_a_scale_too():
    picture = heat_map([stripes(50, 50)], Tiling.single(2, 2), torch.ones(4), "stretch", **HEAT)
    assert len({cell(picture.crop((0, 0, 448, 448)), (2, 2), i)[1] for i in (0, 2)}) == 1
