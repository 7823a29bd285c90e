"""Pictures from files: large ones are scaled while they are decoded, or refused in one line."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops
from vlmprune.eval import image_file
from vlmprune.eval.image_file import InputError, check_picture, read_picture

SIZE = (320, 240)


@pytest.fixture
def picture() -> Image.Image:
    """Without fine detail, so that scaled ones are alike."""
    gradient = Image.linear_gradient("L").resize(SIZE)
    return Image.merge("RGB", (gradient, gradient.rotate(180), gradient.transpose(0)))


@pytest.mark.parametrize(
    ("enough", "size"),
    [
        (SIZE[0] * SIZE[1], SIZE),
        (SIZE[0] * SIZE[1] // 4 + 1, SIZE),  # half of each side would be less than enough
        (SIZE[0] * SIZE[1] // 4, (160, 120)),
        (SIZE[0] * SIZE[1] // 16, (80, 60)),
        (1, (40, 30)),
    ],
)
def test_a_jpeg_of_more_than_enough_pixels_is_scaled(picture, tmp_path, monkeypatch, enough, size):
    picture.save(tmp_path / "a.jpg", quality=95)
    whole = read_picture(tmp_path / "a.jpg")
    monkeypatch.setattr(image_file, "ENOUGH", enough)
    read = read_picture(tmp_path / "a.jpg")
    assert read.size == size and whole.size == SIZE
    apart = ImageChops.difference(read, whole.resize(size, Image.Resampling.BOX))
    assert max(high for _, high in apart.getextrema()) < 12


def test_a_turned_photo_is_scaled_and_turned(picture, tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture.save(tmp_path / "a.jpg", exif=exif)
    monkeypatch.setattr(image_file, "ENOUGH", SIZE[0] * SIZE[1] // 4)
    assert read_picture(tmp_path / "a.jpg").size == (120, 160)


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp"])
def test_other_formats_are_decoded_whole(picture, tmp_path, monkeypatch, name):
    picture.save(tmp_path / name)
    monkeypatch.setattr(image_file, "ENOUGH", 100)
    assert read_picture(tmp_path / name).size == SIZE


@pytest.mark.parametrize("read", [read_picture, check_picture])
@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_large_pictures_pass_without_a_warning(picture, tmp_path, monkeypatch, read, name):
    picture.save(tmp_path / name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIZE[0] * SIZE[1] - 1)
    assert read(tmp_path / name)


@pytest.mark.parametrize("read", [read_picture, check_picture])
def test_what_pillow_refuses_is_one_line(picture, tmp_path, monkeypatch, read):
    picture.save(tmp_path / "a.jpg")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20_000)
    with pytest.raises(InputError, match=r"a\.jpg' has more than the 0\.04 megapixels .*scale it"):
        read(tmp_path / "a.jpg")
