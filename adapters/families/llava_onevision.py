"""LLaVA-OneVision: SigLIP, up to 9 tiles' worth of tokens, plain images among several, videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from ..family import VIDEO, Call, Modality
from .llava_next_video import LlavaNextVideo


class LlavaOnevision(LlavaNextVideo):
    name = "llava_onevision"
    since = "5.20"
    newline_of_videos = "end"

    def pictures(self, call: Call) -> Sequence[Sequence[tuple[int, int]]]:
        tiles = super().pictures(call)
        per_sample = call.inputs.get("batch_num_images")
        if call.modality is VIDEO or per_sample is None:
            return tiles
        alone = [int(number) == 1 for number in per_sample for _ in range(int(number))]
        return [all_ if single else all_[:1] for all_, single in zip(tiles, alone, strict=True)]

    def per_image_arguments(self, modality: Modality) -> frozenset[str]:
        return super().per_image_arguments(modality) | {"batch_num_images"}

    def only(self, call: Call, images: Sequence[int]) -> tuple[Sequence[int], Call]:
        """The model takes an image for the only one of its prompt unless another comes with it."""
        per_prompt = call.inputs.get("batch_num_images")
        if call.modality is VIDEO or per_prompt is None:
            return super().only(call, images)
        taken: list[int] = []
        counts, first = [], 0
        for number in per_prompt.tolist():
            prompt = range(first, first + number)
            here = [i for i in prompt if i in images]
            if len(here) == 1 < number:
                neighbour = prompt[1] if here[0] == first else here[0] - 1
                here = sorted([*here, neighbour])
            taken += here
            counts += [len(here)] if here else []
            first += number
        _, chosen = super().only(call, taken)
        some = {**chosen.inputs, "batch_num_images": per_prompt.new_tensor(counts)}
        return taken, replace(call, inputs=some)

    def pool(self, frames: Tensor) -> Tensor:
        pooled: Tensor = self.core.apply_pooling(frames)
        return pooled

    @property
    def pooled_side(self) -> int:
        return (self.side + 1) // 2

    def pack(
        self, tiles: Sequence[Tensor], sizes: Tensor, newline: Tensor | None
    ) -> Sequence[Tensor]:
        packed: Sequence[Tensor]
        packed, _ = self.core.pack_image_features(
            tiles,
            sizes,
            image_newline=newline,
            vision_aspect_ratio=self.model.config.vision_aspect_ratio,
        )
        return packed
