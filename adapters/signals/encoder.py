"""What methods before the LLM asked to see, read while the vision encoder runs and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...prune.contract import (
    BeforeLLM,
    ClipImage,
    ClipText,
    ClsFeatures,
    EncoderFeatures,
    Features,
    LayerSignal,
    PixelSeed,
    Signal,
    TextEmbeddings,
)
from ...prune.errors import UnsupportedFeatureError, VlmpruneError
from ...prune.tiling import Tiling
from ..clip_text import ClipText as ClipTextEncoder
from ..family import Call, Family
from ..sequence.prompt import Prompt
from .table import ENCODER_ATTENTION, SOURCES, shown


class Recording:
    """What the taps on encoder layers read in one call."""

    def __init__(self) -> None:
        self._parts: dict[Signal, list[Tensor]] = {}

    def hear(self, signal: Signal, query: Tensor, key: Tensor, scaling: float, **kw: Any) -> None:
        """Windowed and packed encoders call attention once per segment, in sequence order."""
        parts = self._parts.setdefault(signal, [])
        read = SOURCES[type(signal)].read
        bounds = kw.get("cu_seq_lens_q")
        if bounds is None:
            parts.append(read(query, key, scaling))
            return
        sizes = bounds.diff().tolist()  # flash attention: all images in one packed sequence
        for q, k in zip(query.split(sizes, 2), key.split(sizes, 2), strict=True):
            parts.append(read(q, k, scaling))

    def values(self, signal: Signal) -> Tensor:
        """(B, S, ...) as the attention modules saw the tokens."""
        parts = self._parts.get(signal)
        if not parts:
            raise VlmpruneError(f"The vision encoder ran without reaching the layer of {signal}.")
        return torch.cat(parts, dim=1)


class Reader:
    """The signals of the images of one call of `get_image_features` or `get_video_features`."""

    def __init__(
        self,
        family: Family,
        call: Call,
        *,
        output: Any,
        features: Sequence[Tensor],
        tilings: Sequence[Tiling],
        recording: Recording,
        prompt: Prompt | None,
        clip: ClipTextEncoder | None,
    ) -> None:
        self._family, self._call = family, call
        self._output, self._features = output, features
        self._tilings, self._recording = tilings, recording
        self._prompt, self._clip = prompt, clip

    def read(self, method: BeforeLLM) -> list[dict[Signal, Tensor]]:
        """Per image, each signal that the method declares, as the contract describes it."""
        shape = self._family.shape
        needs = [need for need in method.needs(shape) if not isinstance(need, LayerSignal)]
        columns = {}
        for need in needs:
            with torch.set_grad_enabled(torch.is_grad_enabled() and need.of_rows):
                columns[need] = self._column(need, method)
        # An encoder may be spread over several devices: choices are made where its features are.
        return [
            {n: columns[n][i].to(features.device) for n in columns}
            for i, features in enumerate(self._features)
        ]

    def _column(self, need: Signal, method: BeforeLLM) -> Sequence[Tensor]:
        """One signal of all images."""
        if shown(need) == ENCODER_ATTENTION:
            return self._patches(self._recording.values(need))
        match need:
            case Features():
                return self._llm_features(with_newlines=method.newline_policy == "compete")
            case EncoderFeatures():
                return self._family.merged_patches(self._call, self._encoder_features())
            case ClsFeatures():
                return self._cls_features()
            case PixelSeed():
                return [pixel_seed(image) for image in self._family.pixels(self._call)]
            case ClipImage():
                return self._patches(self._text_twin.image(self._encoder_features()))
            case ClipText():
                return [self._text_twin.text(ids) for ids in self._texts(need)]
            case TextEmbeddings():
                embed = self._family.model.get_input_embeddings()
                return [embed(ids) for ids in self._texts(need)]
        raise VlmpruneError(f"{need} is no signal of a method before the LLM.")

    @property
    def _text_twin(self) -> ClipTextEncoder:
        if self._clip is None:
            raise VlmpruneError("A text encoder was asked for that `patch` was not given.")
        return self._clip

    def _patches(self, values: Tensor) -> Sequence[Tensor]:
        return self._family.per_image(self._call, values)

    def _encoder_features(self) -> Tensor:
        return self._family.encoder_features(self._call, self._output)

    def _cls_features(self) -> Sequence[Tensor]:
        pictures = self._family.pictures(self._call)
        per_image = self._encoder_features()[:, 0].split([len(seen) for seen in pictures])
        return [
            seen[[tile.picture for tile in tiling.tiles]]  # not those of which nothing is left
            for seen, tiling in zip(per_image, self._tilings, strict=True)
        ]

    def _llm_features(self, *, with_newlines: bool) -> Sequence[Tensor]:
        if with_newlines:
            return self._features
        return [
            image[tiling.patches(image.device)] if tiling.num_newlines else image
            for image, tiling in zip(self._features, self._tilings, strict=True)
        ]

    def _texts(self, need: Signal) -> Sequence[Tensor]:
        if self._prompt is None:
            raise UnsupportedFeatureError(
                f"{need} is read from the prompt, which is not known when images are encoded on "
                f"their own: pass pixel_values together with input_ids."
            )
        return self._prompt.texts(self._call.modality, [len(image) for image in self._features])


def pixel_seed(pixels: Tensor) -> Tensor:
    """A 0-d int64 from the bits of an image's pixels; equal pixels give equal seeds anywhere."""
    bits = pixels.float().contiguous().view(torch.int32).flatten().long()
    weights = torch.arange(bits.numel(), device=bits.device) % 8191 + 1
    return (bits * weights).sum() % (2**31 - 1)
