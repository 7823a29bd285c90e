"""What methods before the LLM asked to see of images that have left the vision encoder.

A reader is given the images of one call and a signal, and returns a value for each image. `table`
says which reader serves which signal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...prune.contract import Signal
from ...prune.errors import UnsupportedFeatureError, VlmpruneError
from ...prune.tiling import Tiling
from ..clip_text import ClipText
from ..family import Call, Family
from ..sequence.prompt import Prompt


@dataclass(frozen=True)
class Images:
    """The images of one call of `get_image_features` or `get_video_features`."""

    family: Family
    call: Call
    output: Any
    """What the call returned."""
    features: Sequence[Tensor]
    """Per image, (N, D): its tokens as the LLM would see them."""
    tilings: Sequence[Tiling]
    prompt: Prompt | None
    clip: ClipText | None
    newlines_compete: bool
    """Whether newlines are among the tokens that signals cover."""
    spread: Callable[[Tensor, int | None], Tensor] | None = None
    """Where rows left in the encoder: values of those that came to a block's attention (None: that
    left the last block that is read), as those of all patches."""

    def patches(self, values: Tensor) -> Sequence[Tensor]:
        """Values of encoder tokens (B, S, ...) as those of each image's patches: (P, ...)."""
        return self.family.per_image(self.call, values)

    @property
    def encoder_features(self) -> Tensor:
        """(B, S, C): what the projector reads, CLS included."""
        given = self.family.encoder_features(self.call, self.output)
        return given if self.spread is None else self.spread(given, None)

    @property
    def text_encoder(self) -> ClipText:
        if self.clip is None:
            raise VlmpruneError("A text encoder was asked for that `patch` was not given.")
        return self.clip

    def texts(self, need: Signal) -> Sequence[Tensor]:
        """Ids of the text that belongs to each image: (T,)."""
        if self.prompt is None or not self.prompt.words:
            raise UnsupportedFeatureError(
                f"{need} is read from the prompt, which is not known when images are encoded on "
                f"their own: pass pixel_values together with input_ids."
            )
        return self.prompt.texts(self.call.modality, [len(image) for image in self.features])


def features(images: Images, need: Signal) -> Sequence[Tensor]:
    if images.newlines_compete:
        return images.features
    return [
        image[tiling.patches(image.device)] if tiling.num_newlines else image
        for image, tiling in zip(images.features, images.tilings, strict=True)
    ]


def encoder_features(images: Images, need: Signal) -> Sequence[Tensor]:
    return images.family.merged_patches(images.call, images.encoder_features)


def cls_features(images: Images, need: Signal) -> Sequence[Tensor]:
    pictures = images.family.pictures(images.call)
    per_image = images.encoder_features[:, 0].split([len(seen) for seen in pictures])
    return [
        seen[[tile.picture for tile in tiling.tiles]]  # not those of which nothing is left
        for seen, tiling in zip(per_image, images.tilings, strict=True)
    ]


def pixel_seeds(images: Images, need: Signal) -> Sequence[Tensor]:
    return [pixel_seed(pixels) for pixels in images.family.pixels(images.call)]


def clip_image(images: Images, need: Signal) -> Sequence[Tensor]:
    return images.patches(images.text_encoder.image(images.encoder_features))


def clip_text(images: Images, need: Signal) -> Sequence[Tensor]:
    return [images.text_encoder.text(ids) for ids in images.texts(need)]


def text_embeddings(images: Images, need: Signal) -> Sequence[Tensor]:
    embed = images.family.model.get_input_embeddings()
    return [embed(ids) for ids in images.texts(need)]


def pixel_seed(pixels: Tensor) -> Tensor:
    """A 0-d int64 from the bits of an image's pixels; equal pixels give equal seeds anywhere."""
    bits = pixels.float().contiguous().view(torch.int32).flatten().long()
    weights = torch.arange(bits.numel(), device=bits.device) % 8191 + 1
    return (bits * weights).sum() % (2**31 - 1)
