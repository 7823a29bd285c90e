"""Idefics3-8B: square tiles with words between them, SigLIP and Llama 3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from transformers import Idefics3Config, Idefics3VisionConfig, LlamaConfig

from ....prune.errors import MethodFieldError
from ..family import EvalFamily, Pixels, Shape, noise
from ..tiny_layouts import DECODER, IMAGE, PAD, PIXELS, TOWER, VISION_END, VISION_START, Row
from ..tiny_layouts import images as images_of
from ..tiny_models import Case, tiny_shape
from .internvl import TILES, SquareTiles

_MARK, _ROW = VISION_START, 108


class NamedTiles(SquareTiles):
    """A mark and a name of some words before each tile, a word between rows of two, and the mark
    once more behind the image; prompts are filled up with tiles of zeros."""

    def __init__(self, name: tuple[int, ...]) -> None:
        super().__init__(TILES, 3)
        self.name = name

    def framed(self, image: str, tokens: list[int]) -> list[int]:
        ids: list[int] = []
        for number, at in enumerate(range(0, len(tokens), self.side**2)):
            breaks = [_ROW] if number and number % 2 == 0 else []
            ids += [*breaks, _MARK, *self.name, *tokens[at : at + self.side**2]]
        return [*ids, _MARK, VISION_END]

    def extra(self, rows: Sequence[Row], ids: torch.Tensor) -> dict[str, Any]:
        prompts = [[self.pixels(name) for name in images_of([row])] for row in rows]
        if not any(prompts):
            return {}
        most = max(sum(map(len, prompt)) for prompt in prompts)
        pixels = torch.zeros(len(rows), most, 3, PIXELS, PIXELS)
        for filled, prompt in zip(pixels, prompts, strict=True):
            if prompt:
                filled[: sum(map(len, prompt))] = torch.cat(prompt)
        mask = torch.ones(len(rows), most, PIXELS, PIXELS, dtype=torch.long)
        return {"pixel_values": pixels, "pixel_attention_mask": mask}


def siglip_llama(
    config: Any, vision: Any, image_token: int, text: Mapping[str, int], **options: Any
) -> Any:
    """A model of this line; `text` are sizes of its decoder."""
    heads = text["num_attention_heads"]
    decoder = LlamaConfig(**{"num_key_value_heads": heads, **text})
    return config(vision_config=vision, text_config=decoder, image_token_id=image_token, **options)


def tiny_idefics3(config: Any = Idefics3Config, vision: Any = Idefics3VisionConfig) -> Any:
    text = {**DECODER, "num_key_value_heads": 2}
    options = {"scale_factor": 2, "pad_token_id": PAD}
    return siglip_llama(config, vision(**TOWER), IMAGE, text, **options)


def _idefics3() -> Idefics3Config:
    """Idefics3-8B-Llama3 at its defaults."""
    text = {
        "vocab_size": 128259,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    }
    vision = Idefics3VisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=27,
        num_attention_heads=16,
        image_size=364,
        patch_size=14,
    )
    options = {"scale_factor": 2, "tie_word_embeddings": False}
    return siglip_llama(Idefics3Config, vision, 128257, text, **options)


SHUFFLED = tiny_shape(has_cls=False, merge_unit=4)


class Idefics3(EvalFamily):
    line = "Idefics"
    wrapper: ClassVar[str] = "vlmprune"  # lmms-eval has none
    shapes: ClassVar[tuple[Shape, ...]] = (Shape("idefics3-8b", _idefics3, (1456, 1456)),)
    tiny: ClassVar[tuple[Case, ...]] = (
        Case("idefics3", tiny_idefics3, SHUFFLED, NamedTiles((110, 109, 107))),
    )

    def usual_picture(self, config: Any) -> tuple[int, int]:
        side = config.vision_config.image_size
        return side, side

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        """A picture of whole tiles, and where it is several a thumbnail behind them."""
        side = config.vision_config.image_size
        if picture[0] % side or picture[1] % side:
            raise MethodFieldError(
                f"A picture of {picture[0]}x{picture[1]}: sides must be multiples of {side}."
            )
        crops = (picture[0] // side) * (picture[1] // side)
        tiles = crops + (crops > 1)
        tokens = (side // config.vision_config.patch_size // config.scale_factor) ** 2
        return Pixels(
            tiles * tokens, {"pixel_values": noise(device, batch_size, tiles, 3, side, side)}
        )
