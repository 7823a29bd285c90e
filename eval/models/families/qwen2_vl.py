"""Qwen2-VL: pictures of any size, their patches packed in one row; no published sizes."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from transformers import Qwen2VLConfig

from ....prune.errors import MethodFieldError
from ..family import EvalFamily, Pixels, Scaling, noise
from ..smaller import Count, Smaller, smaller_grid
from ..tiny_layouts import DECODER, IMAGE, MROPE, VIDEO, VISION_END, VISION_START, Packed
from ..tiny_models import Case, tiny_shape

TOKEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}


MERGING = tiny_shape(has_cls=False, merge_unit=4, rotary=True)
PACKED = Packed()


def tiny_config(config_class: Any, text: dict[str, Any], **vision: Any) -> Any:
    """Decoder and encoder in the sizes of the others; `text` and `vision` are what differs."""
    patches = {"patch_size": 4, "temporal_patch_size": 2, "spatial_merge_size": 2}
    return config_class(
        text_config={**DECODER, "num_key_value_heads": 2, "rope_parameters": MROPE, **text},
        vision_config={"depth": 5, "num_heads": 4, **patches, **vision},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )


def _tiny() -> Any:
    sizes = {"embed_dim": 48, "hidden_size": DECODER["hidden_size"], "mlp_ratio": 2}
    return tiny_config(Qwen2VLConfig, {}, **sizes)


class Qwen2VL(EvalFamily):
    line = "Qwen"
    wrapper: ClassVar[str] = "qwen2_vl"
    marks: ClassVar[tuple[str, str]] = ("vision_start_token_id", "vision_end_token_id")
    """The configuration's names of what stands around a picture."""
    scaling: ClassVar[Scaling | None] = Scaling(
        limits_images=True, thins_videos=True, system_prompt=True
    )
    tiny: ClassVar[tuple[Case, ...]] = (
        Case("qwen2_vl", _tiny, MERGING, PACKED, fixed_positions=True),
    )

    def usual_picture(self, config: Any) -> tuple[int, int]:
        side = 36 * config.vision_config.patch_size * config.vision_config.spatial_merge_size
        return side, side

    def smaller(self, config: Any, processor: Any, count: Count) -> Smaller:
        return smaller_grid(processor, count)

    def pixels(self, config: Any, picture: tuple[int, int], batch_size: int, device: str) -> Pixels:
        """Patches of all pictures in one row."""
        vision = config.vision_config
        unit = vision.patch_size * vision.spatial_merge_size
        if picture[0] % unit or picture[1] % unit:
            raise MethodFieldError(
                f"A picture of {picture[0]}x{picture[1]}: sides must be multiples of {unit}."
            )
        rows, columns = (pixels // vision.patch_size for pixels in picture)
        values = 3 * vision.temporal_patch_size * vision.patch_size**2
        inputs = {
            "pixel_values": noise(device, batch_size * rows * columns, values),
            "image_grid_thw": torch.tensor([[1, rows, columns]] * batch_size),
        }
        start, end = (getattr(config, mark) for mark in self.marks)
        return Pixels(rows * columns // vision.spatial_merge_size**2, inputs, (start, end))
