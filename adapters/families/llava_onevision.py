"""LLaVA-OneVision: SigLIP, up to 9 tiles' worth of tokens, plain images among several, videos."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...prune.tiling import Block, Tiling
from ..family import IMAGE, VIDEO, Inputs, Modality, Model
from .llava_next import LlavaNext


class LlavaOnevision(LlavaNext):
    name = "llava_onevision"
    modalities = (IMAGE, VIDEO)

    def tilings(
        self, model: Model, modality: Modality, features: Sequence[Tensor], inputs: Inputs
    ) -> Sequence[Tiling]:
        if modality is IMAGE:
            return super().tilings(model, modality, features, inputs)
        side = (self.side(model) + 1) // 2  # frames are pooled to half of it
        frames = inputs["pixel_values_videos"].shape[1]
        frame, last = Block((side,), (side,)), Block((side,), (side,), "end")
        return [Tiling((*[frame] * (frames - 1), last))] * len(features)

    def pixels(self, model: Model, modality: Modality, inputs: Inputs) -> Sequence[Tensor]:
        if modality is VIDEO:
            return inputs["pixel_values_videos"].split(1)
        return super().pixels(model, modality, inputs)

    def pictures(
        self, model: Model, modality: Modality, inputs: Inputs
    ) -> Sequence[Sequence[tuple[int, int]]]:
        if modality is VIDEO:
            videos, frames = inputs["pixel_values_videos"].shape[:2]
            return [[(self.side(model), self.side(model))] * frames] * videos
        tiles = super().pictures(model, modality, inputs)
        per_sample = inputs.get("batch_num_images")
        if per_sample is None:
            return tiles
        alone = [int(number) == 1 for number in per_sample for _ in range(int(number))]
        return [all_ if single else all_[:1] for all_, single in zip(tiles, alone, strict=True)]

    def per_image_arguments(self, modality: Modality) -> frozenset[str]:
        return super().per_image_arguments(modality) | {"batch_num_images"}

    def only(
        self, model: Model, modality: Modality, inputs: Inputs, images: Sequence[int]
    ) -> tuple[Sequence[int], Inputs]:
        """The model takes an image for the only one of its prompt unless another comes with it."""
        per_prompt = inputs.get("batch_num_images")
        if modality is VIDEO or per_prompt is None:
            return super().only(model, modality, inputs, images)
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
        _, chosen = super().only(model, modality, inputs, taken)
        return taken, {**chosen, "batch_num_images": per_prompt.new_tensor(counts)}

    def per_image(
        self, model: Model, modality: Modality, values: Tensor, inputs: Inputs
    ) -> Sequence[Tensor]:
        if modality is IMAGE:
            return super().per_image(model, modality, values, inputs)
        patches = self.patches(model, values)
        pooled = self.core(model).apply_pooling(patches.reshape(*patches.shape[:2], -1))
        videos = inputs["pixel_values_videos"].shape[0]
        return list(pooled.reshape(videos, -1, *patches.shape[2:]))

    def pack(
        self, model: Model, tiles: Sequence[Tensor], sizes: Tensor, newline: Tensor | None
    ) -> Sequence[Tensor]:
        packed: Sequence[Tensor]
        packed, _ = self.core(model).pack_image_features(
            tiles,
            sizes,
            image_newline=newline,
            vision_aspect_ratio=model.config.vision_aspect_ratio,
        )
        return packed
