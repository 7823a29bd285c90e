"""LLaVA-NeXT-Video: LLaVA-NeXT for images, and videos whose frames are pooled 2 x 2."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from ...prune.errors import UnsupportedModelError
from ...prune.tiling import Block, Tiling
from ..family import IMAGE, VIDEO, Call, Modality
from .llava_next import LlavaNext


class LlavaNextVideo(LlavaNext):
    name = "llava_next_video"
    since = "5.21"  # which gives one row of features a video
    modalities: ClassVar[tuple[Modality, ...]] = (IMAGE, VIDEO)
    newline_of_videos: ClassVar[Literal["none", "end"]] = "none"
    """Whether a newline follows the last frame."""

    def tilings(self, call: Call, features: Sequence[Tensor]) -> Sequence[Tiling]:
        """A block per frame of a video."""
        if call.modality is IMAGE:
            return super().tilings(call, features)
        side = self.pooled_side
        last = Block((side,), (side,), self.newline_of_videos)
        return [
            Tiling((Block((side,), (side,)),) * (len(frames) - 1) + (last,))
            for frames in self.pictures(call)
        ]

    def per_image(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        if call.modality is IMAGE:
            return super().per_image(call, values)
        patches = self.patches(values)
        pooled = self.pool(patches.reshape(*patches.shape[:2], -1))
        return list(pooled.reshape(len(self.pictures(call)), -1, *patches.shape[2:]))

    def pool(self, frames: Tensor) -> Tensor:
        """Values of a video's patches (frames, P, C) as the model pools them: (frames, P', C)."""
        if (mode := self.model.config.spatial_pool_mode) != "average":
            raise UnsupportedModelError(
                f"spatial_pool_mode={mode!r}: values of patches follow frames that are averaged "
                f"only. Use a method that reads features alone (divprune), or "
                f"vlmprune.unpatch(model) for videos."
            )
        pooled: Tensor = self.core.vision_resampler(frames)
        return pooled

    @property
    def pooled_side(self) -> int:
        """Rows and columns of tokens of a frame."""
        return self.side // int(self.model.config.spatial_pool_stride)
