"""What tests need of LLaVA-NeXT: its tiny models, and its real processor."""

from __future__ import annotations

import transformers
from kit.words import PLAIN as MARKS
from kit.words import tokenizer
from vlmprune.eval.models.families.llava import CLIP
from vlmprune.eval.models.families.llava_next import CANVASES, tiny_granite, tiny_llava_next
from vlmprune.eval.models.tiny_layouts import PINPOINTS, PIXELS, Tiles
from vlmprune.eval.models.tiny_models import Case, tiny_shape
from vlmprune.prune.tiling import Block

CASES = ("llava_next",)
ONE = "llava_next"


def _wide() -> transformers.LlavaNextConfig:
    config = tiny_llava_next()
    config.image_grid_pinpoints = [[24, 72], [72, 24]]
    return config


GONE = Case(
    "llava_next-gone",
    _wide,
    CLIP,
    Tiles(
        {
            "A": ((24, 20), Block((6,), (0, 6, 0), "rows")),
            "B": ((30, 24), Block((1, 6, 1), (6,), "rows")),
            "C": ((24, 12), Block((6,), (0, 4, 0), "rows")),
        }
    ),
)
"""Narrow pictures on wide canvases: of some tiles only padding was seen, and nothing is left."""

GRANITE = Case(
    "llava_next-granite",
    tiny_granite,
    tiny_shape(has_cls=False, blocks_read=5),
    Tiles(CANVASES),
)
"""Granite Vision: SigLIP, of which four layers are read, and a decoder that scales everything."""


def processor() -> transformers.ProcessorMixin:
    """The real processor, for the tiny models."""
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": PIXELS},
        crop_size={"height": PIXELS, "width": PIXELS},
        image_grid_pinpoints=PINPOINTS,
    )
    return transformers.LlavaNextProcessor(
        images,
        tokenizer(MARKS),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
