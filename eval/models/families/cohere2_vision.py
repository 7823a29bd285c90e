"""Command A Vision: square tiles with a line break behind each, the whole picture last."""

from __future__ import annotations

from typing import Any

from transformers import Cohere2Config, Cohere2VisionConfig, SiglipVisionConfig

from ....prune.errors import MethodFieldError
from ..family import EvalFamily, Pixels, Shape, noise
from ..tiny_layouts import DECODER, IMAGE, TOWER, VISION_END, VISION_START
from ..tiny_models import Case, tiny_shape
from .internvl import TILES, SquareTiles
from .paligemma import SO400M

BREAK = 110


def _command_a() -> Cohere2VisionConfig:
    """Command A Vision, 112B."""
    text = Cohere2Config(
        vocab_size=256000,
        hidden_size=12288,
        intermediate_size=36864,
        num_hidden_layers=64,
        num_attention_heads=96,
        num_key_value_heads=8,
        head_dim=128,
    )
    vision = SiglipVisionConfig(**{**SO400M, "patch_size": 16}, image_size=512)
    return Cohere2VisionConfig(vision_config=vision, text_config=text)


def tiny_cohere2(window: int = 512) -> Cohere2VisionConfig:
    text = Cohere2Config(
        **DECODER,
        num_key_value_heads=2,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"] * 2,
        tie_word_embeddings=False,
    )
    return Cohere2VisionConfig(
        vision_config=SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=text,
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=96,
        tie_word_embeddings=False,
    )


class BrokenTiles(SquareTiles):
    """A line break behind each tile, two marks around an image."""

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        tile = self.side**2
        ids = [[*tokens[i : i + tile], BREAK] for i in range(0, len(tokens), tile)]
        return [VISION_START, *(x for one in ids for x in one), VISION_END]


SHUFFLING = tiny_shape(has_cls=False, merge_unit=4)
LAYOUT = BrokenTiles(TILES, 3)


class Cohere2Vision(EvalFamily):
    line = "Command A"
    wrapper = "vlmprune"  # lmms-eval has none
    shapes = (Shape("command-a-vision", _command_a, (512, 512)),)
    tiny = (Case("cohere2_vision", tiny_cohere2, SHUFFLING, LAYOUT),)

    def usual_picture(self, config: Any) -> tuple[int, int]:
        side = config.vision_config.image_size
        return side, side

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        """A picture of one tile."""
        side = config.vision_config.image_size
        if picture != (side, side):
            raise MethodFieldError(
                f"A picture of {picture[0]}x{picture[1]}: here it is one tile of {side}x{side}."
            )
        tokens = (side // config.vision_config.patch_size // config.downsample_factor) ** 2
        return Pixels(tokens, {"pixel_values": noise(device, batch_size, 3, side, side)})
