"""GLM-4.1V: Qwen2-VL with a convolution that merges patches, and times between a video's frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...prune.errors import UnsupportedFeatureError
from ..family import IMAGE, VIDEO, Call, Modality
from .qwen2_vl import Qwen2VL


class Glm4V(Qwen2VL):
    name = "glm4v"

    def project(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.vision_tower.merger(rows)
        return projected

    def merged_patches(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        """The encoder has merged them itself, into one row a token."""
        sizes = call.inputs[self.sizes(call.modality)].prod(-1) // self.tower.merge_unit
        return values[0].split(sizes.tolist())

    def placeholder(self, modality: Modality) -> int:
        """Frames of a video have those of images."""
        return super().placeholder(IMAGE)

    def check_generate(self, kwargs: Mapping[str, Any], copies: int) -> None:
        """`transformers` looks for a video's copies where the prompt has `video_token_id`."""
        if copies > 1 and kwargs.get(VIDEO.pixels) is not None:
            raise UnsupportedFeatureError(
                f"generate() of {self.name} makes no copies of videos: leave num_beams and "
                f"num_return_sequences out, or repeat the prompt and its videos in the batch."
            )
