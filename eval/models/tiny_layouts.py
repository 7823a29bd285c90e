"""Layouts of tiny inputs: what the processors of a family give, and where the tokens lie.

A prompt is written as a tuple: numbers are runs of text tokens, letters are images, so
`(3, "A", 2, "B", 5)` is three text tokens, image A, two text tokens, image B, five text tokens. The
same letter is the same image and the same tuple the same text in every batch. V and W are videos,
for the models that take them; "images" in names below are images and videos.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...prune.tiling import Block, Tiling

Row = tuple[int | str, ...]

ONE: Row = (7, "C", 3)
TWO: Row = (3, "A", 2, "B", 5)
NONE: Row = (9,)
SINGLE = (ONE,)
BATCH = (TWO, ONE, NONE)
MIXED: tuple[Row, ...] = ((3, "D", 2, "W", 4), (2, "V", "B", 1, "W", 1, "A", 3), (4, "V", 3), NONE)
"""Prompts with videos, for models that take them."""

VOCAB = 120
PAD, VISION_START, VISION_END, IMAGE, VIDEO = 0, 112, 113, 118, 119
VIDEO_START, VIDEO_END = 114, 115
FIRST_WORD, LAST_WORD = 3, 111

DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": PAD,
}
TOWER = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "image_size": 24,
    "patch_size": 4,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
PATCH_GRIDS = {
    "A": (1, 8, 12),
    "B": (1, 6, 10),
    "C": (1, 8, 8),
    "D": (1, 12, 12),
    "V": (3, 4, 8),
    "W": (2, 6, 6),
}
"""Patches (time, height, width) of images, 24, 15, 16 and 36 visual tokens, and of videos."""

PIXELS = TOWER["image_size"]
SIDE = PIXELS // TOWER["patch_size"]
FRAMES = {"V": 3, "W": 3}
PINPOINTS = [[24, 48], [48, 24], [48, 48], [24, 72], [72, 24]]
"""Canvases of tiles (height, width in pixels): 1x2, 2x1, 2x2, 1x3 and 3x1 tiles."""


class Plain:
    """Every image is one square of tokens."""

    takes_videos = False
    packed = False
    """Whether patches of all images come in one row."""
    videos = MIXED
    """Prompts with videos, where the model takes them."""
    resampled = ""
    """Images whose patches are mixed behind the encoder: scaled or pooled."""

    def tiling(self, image: str, alone: bool) -> Tiling:
        """How the tokens of an image lie; `alone`: no other image in its prompt."""
        return Tiling.single(SIDE, SIDE)

    def placeholder(self, image: str) -> int:
        """The token that stands for each of its tokens."""
        return VIDEO if image in FRAMES else IMAGE

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        """The placeholders of an image and what a processor puts around them."""
        return tokens

    def around(self, image: str) -> tuple[int, int]:
        """How many ids stand before the first placeholder of an image, and behind the last."""
        marks = [token != IMAGE for token in self.framed(image, [IMAGE])]
        return marks.index(False), marks[::-1].index(False)

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        """All inputs but `input_ids` and `attention_mask`."""
        if not images(rows):
            return {}
        return {"pixel_values": torch.cat([self.pixels(name) for name in images(rows)])}

    def pixels(self, image: str) -> torch.Tensor:
        """One image as the encoder sees it: (1, 3, H, W)."""
        return noise(image, 1, 3, PIXELS, PIXELS)


class Packed(Plain):
    """Grids of any size, patches of all images packed, two marks around each."""

    takes_videos = True
    packed = True

    def tiling(self, image: str, alone: bool) -> Tiling:
        frames, height, width = PATCH_GRIDS[image]
        return Tiling((Block((height // 2,), (width // 2,)),) * frames)

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        return [VISION_START, *tokens, VISION_END]

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        inputs = {"mm_token_type_ids": (ids == IMAGE).int() + 2 * (ids == VIDEO).int()}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            names = [n for n in images(rows) if (n in FRAMES) == (kind == "video")]
            if names:
                inputs[pixels] = torch.cat([self.pixels(name) for name in names])
                inputs[f"{kind}_grid_thw"] = torch.tensor([PATCH_GRIDS[name] for name in names])
        return inputs

    def pixels(self, image: str) -> torch.Tensor:
        """Patches of one image: (P, 3 * 2 * 4 * 4)."""
        return noise(image, math.prod(PATCH_GRIDS[image]), 3 * 2 * 4 * 4)


class Tiles(Plain):
    """A thumbnail and crops; `images`: sizes (height, width), and what is left of the
    canvas of crops."""

    def __init__(self, images: Mapping[str, tuple[tuple[int, int], Block]]) -> None:
        self.images = images

    def tiling(self, image: str, alone: bool) -> Tiling:
        return Tiling((Block((SIDE,), (SIDE,)), self.images[image][1]))

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        found = [(name, alone) for name, alone in placed(rows) if name not in FRAMES]
        if not found:
            return {}
        pixels = [self.tiles(name, alone) for name, alone in found]
        most = max(map(len, pixels))
        padded = [torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])]) for x in pixels]
        return {
            "pixel_values": torch.stack(padded),
            "image_sizes": torch.tensor([self.images[name][0] for name, _ in found]),
        }

    def tiles(self, image: str, alone: bool) -> torch.Tensor:
        """The pictures that the encoder sees of one image: (tiles, 3, H, W)."""
        blocks = self.tiling(image, alone).blocks
        count = sum(len(block.row_sizes) * len(block.column_sizes) for block in blocks)
        return noise(image, count, 3, PIXELS, PIXELS)


def noise(name: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(ord(name)))


def placed(rows: Sequence[Row]) -> list[tuple[str, bool]]:
    """Letters in batch order, and whether each is the only image (not video) of its prompt."""
    found = []
    for row in rows:
        names = images([row])
        alone = sum(name not in FRAMES for name in names) == 1
        found += [(name, alone) for name in names]
    return found


PLAIN = Plain()


def joined(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Images of two calls as those of one; tiles are padded to the same number and size."""
    found = {}
    for key in one:
        parts = [one[key], two[key]]
        most = [max(sizes) for sizes in zip(*(part.shape[1:] for part in parts), strict=True)]
        padded = [part.new_zeros(len(part), *most) for part in parts]
        for into, part in zip(padded, parts, strict=True):
            into[tuple(slice(size) for size in part.shape)] = part
        found[key] = torch.cat(padded)
    return found


def images(rows: Sequence[Row]) -> list[str]:
    """Letters of the images of a batch, in batch order."""
    return [part for row in rows for part in row if isinstance(part, str)]


def is_visual(ids: torch.Tensor) -> torch.Tensor:
    """Which token ids are placeholders of images or videos."""
    return (ids == IMAGE) | (ids == VIDEO)


def encoder_inputs(inputs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The arguments of `get_image_features` and of `get_video_features` among a model's inputs."""
    of = {
        "image": (
            *("pixel_values", "pixel_attention_mask", "image_sizes"),
            *("batch_num_images", "image_grid_thw", "spatial_shapes", "image_position_ids"),
        ),
        "video": (
            *("pixel_values_videos", "video_grid_thw"),
            *("video_position_ids", "num_frames_per_video"),
        ),
    }
    found = {name: {k: inputs[k] for k in keys if k in inputs} for name, keys in of.items()}
    return {name: given for name, given in found.items() if given}
