"""Video-LLaVA: CLIP towers of images and of videos, whose frames keep their CLS as a token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...prune.contract import Tower
from ...prune.errors import UnsupportedModelError
from ...prune.tiling import Block, Tiling
from ..family import IMAGE, VIDEO, Call, Family, Inputs, Modality
from ..sequence.prompt import Prompt
from .llava import Llava

_OLD = "pixel_values_images"
"""What image processors call the pixels unless they are told not to."""


class VideoLlava(Llava):
    name = "video_llava"
    since = "5.23"
    modalities: ClassVar[tuple[Modality, ...]] = (IMAGE, VIDEO)
    _modality: Modality = IMAGE

    @cached_property
    def _views(self) -> Mapping[Modality, VideoLlava]:
        """Of each modality. They know one another."""
        videos = type(self)(self.model)
        videos._modality = VIDEO
        views = videos._views = {IMAGE: self, VIDEO: videos}
        return views

    def of(self, modality: Modality) -> Family:
        return self._views[modality]

    @property
    def vision_tower(self) -> Any:
        return self.core.image_tower if self._modality is IMAGE else self.core.video_tower

    @property
    def tower(self) -> Tower:
        """The same for both, which have one configuration."""
        return replace(super().tower, text_twin=False)  # one text encoder is no twin of two towers

    def gives(self, inputs: Inputs, modality: Modality) -> bool:
        old = modality is IMAGE and inputs.get(_OLD) is not None
        return old or super().gives(inputs, modality)

    def call(self, modality: Modality, inputs: Inputs, prompt: Prompt | None = None) -> Call:
        if inputs.get(_OLD) is not None and inputs.get(IMAGE.pixels) is None:
            inputs = {**inputs, IMAGE.pixels: inputs[_OLD]}
        return super().call(modality, {k: v for k, v in inputs.items() if k != _OLD}, prompt)

    def images(self, call: Call, pooled: Tensor) -> Sequence[Tensor]:
        """Frames of a video follow one another in the batch."""
        return list(pooled.reshape(len(self.pixels(call)), -1, pooled.shape[-1]))

    def pooled(self, call: Call, images: Sequence[Tensor], kind: type) -> Tensor:
        together = torch.stack(list(images))
        if call.modality is IMAGE:
            return together
        frames = call.inputs[VIDEO.pixels].shape[1]
        return together.unflatten(1, (frames, -1)).flatten(0, 1)

    def tilings(self, call: Call, features: Sequence[Tensor]) -> Sequence[Tiling]:
        """A block per frame of a video, its CLS ahead of it."""
        if call.modality is IMAGE:
            return super().tilings(call, features)
        return [
            Tiling(tuple(Block((rows,), (columns,), lead=1) for rows, columns in frames))
            for frames in self.pictures(call)
        ]

    def per_image(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        patches = self.patches(values)
        return list(patches.reshape(len(self.pictures(call)), -1, *patches.shape[2:]))

    def check(self) -> None:
        """Towers without a CLS row, and images whose CLS row is kept as a token."""
        if not self.tower.has_cls:
            kind = self.vision_tower.config.model_type
            raise UnsupportedModelError(
                f"{type(self.model).__name__} with a {kind!r} vision tower: its frames are a CLS "
                f"row and their patches, so use a clip_vision_model."
            )
        super().check()
