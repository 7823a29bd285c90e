"""Build the sprite sheets and background photos in `data/` from packages that carry them.

    apt-get download fonts-noto-color-emoji dataset-fashion-mnist   # then: dpkg -x *.deb DIR
    pip install scikit-learn scikit-image pillow
    python -m vlmprune.eval.embedded.build_assets --debian DIR

Train and test share the emoji drawings and nothing else: garments come from the two splits of
Fashion-MNIST, digits are split by sample, and the background photos are different pictures.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .assets import DATA_DIR, DIGIT_SIDE, EMOJI_SIDE, GARMENT_SIDE
from .vocabulary import EMOJI, GARMENTS

SAMPLES = {"train": (700, 130), "test": (60, 40)}  # garments, digits per class
TEST_EVERY = 4  # every fourth digit of a class is a test sample
PHOTO_SIDE = 448
PHOTOS = {
    "train": (
        ("skimage", "astronaut.png"),
        ("skimage", "rocket.jpg"),
        ("skimage", "brick.png"),
        ("skimage", "grass.png"),
        ("skimage", "gravel.png"),
        ("skimage", "hubble_deep_field.jpg"),
        ("skimage", "camera.png"),
        ("sklearn", "china.jpg"),
    ),
    "test": (("skimage", "chelsea.png"), ("skimage", "coffee.png"), ("sklearn", "flower.jpg")),
}


def emoji_sheet(font_file: Path) -> Image.Image:
    """All emoji in one row, cropped and centred."""
    font = ImageFont.truetype(str(font_file), 109)  # the font's one bitmap size
    sheet = Image.new("RGBA", (EMOJI_SIDE * len(EMOJI), EMOJI_SIDE))
    for index, character in enumerate(EMOJI.values()):
        glyph = Image.new("RGBA", (136, 128))
        ImageDraw.Draw(glyph).text((0, 0), character, font=font, embedded_color=True)
        glyph = glyph.crop(glyph.getbbox())
        side = max(glyph.size)
        square = Image.new("RGBA", (side, side))
        square.paste(glyph, ((side - glyph.width) // 2, (side - glyph.height) // 2))
        tile = square.resize((EMOJI_SIDE, EMOJI_SIDE), Image.Resampling.LANCZOS)
        sheet.paste(tile, (index * EMOJI_SIDE, 0))
    return sheet


def sample_sheet(rows: list[np.ndarray]) -> Image.Image:
    """One row a class, one square a sample."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


def read_idx(file: Path, header: int, shape: tuple[int, ...]) -> np.ndarray:
    """An array of the MNIST file format."""
    return np.frombuffer(gzip.decompress(file.read_bytes())[header:], np.uint8).reshape(-1, *shape)


def garments(folder: Path, split: str, count: int) -> Image.Image:
    """The first `count` garments of each class."""
    stem = {"train": "train", "test": "t10k"}[split]
    images = read_idx(folder / f"{stem}-images-idx3-ubyte.gz", 16, (GARMENT_SIDE, GARMENT_SIDE))
    labels = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz", 8, ())
    return sample_sheet([images[labels == label][:count] for label in GARMENTS.values()])


def digits(split: str, count: int) -> Image.Image:
    """Handwritten digits; train and test are disjoint samples."""
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = (data.images * (255 / 16)).round().astype(np.uint8)
    rows = []
    for digit in range(10):
        of_digit = pixels[data.target == digit]
        held_out = np.arange(len(of_digit)) % TEST_EVERY == 0
        rows.append(of_digit[held_out == (split == "test")][:count])
    if any(row.shape != (count, DIGIT_SIDE, DIGIT_SIDE) for row in rows):
        raise ValueError(f"the package holds fewer than {count} {split} digits of some class")
    return sample_sheet(rows)


def photo_folders() -> dict[str, Path]:
    """Where the two packages keep their pictures."""
    import skimage
    import sklearn.datasets

    return {
        "skimage": Path(skimage.__file__).parent / "data",
        "sklearn": Path(sklearn.datasets.__file__).parent / "images",
    }


def main() -> None:
    """Write every file of `data/` but the licences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--debian", type=Path, required=True, help="unpacked Debian packages")
    parser.add_argument("--out", type=Path, default=DATA_DIR)
    args = parser.parse_args()
    font = args.debian / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    fashion = args.debian / "usr/share/datasets/fashion-mnist"
    args.out.mkdir(parents=True, exist_ok=True)
    emoji_sheet(font).save(args.out / "emoji.png", optimize=True)
    folders = photo_folders()
    for split, (garment_count, digit_count) in SAMPLES.items():
        folder = args.out / split
        folder.mkdir(exist_ok=True)
        garments(fashion, split, garment_count).save(folder / "garments.png", optimize=True)
        digits(split, digit_count).save(folder / "digits.png", optimize=True)
        for package, name in PHOTOS[split]:
            with Image.open(folders[package] / name) as opened:
                photo = opened.convert("RGB")
            photo.thumbnail((PHOTO_SIDE, PHOTO_SIDE), Image.Resampling.LANCZOS)
            photo.save(folder / f"{Path(name).stem}.jpg", quality=88)


if __name__ == "__main__":
    main()
