"""LLaVA-1.5 in vLLM: shorter placeholders, and the choice behind the projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ....prune.contract import ClsFeatures, EncoderFeatures, Features, Signal
from ....prune.tiling import Tiling
from ..engine import check_engine
from ..served import WORD
from ..sizes import served_of
from .processor import KEEP, Processor
from .questions import TEXT, embedded
from .towers import reading

from vllm.model_executor.models.llava import (  # isort: skip  (behind the version's check)
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # isort: skip


class LlavaProcessor(Processor, LlavaMultiModalProcessor):  # type: ignore[misc]
    """All pictures are squares of one size."""

    def _tilings(
        self, modality: str, found: Mapping[str, Any]
    ) -> Sequence[Sequence[Tiling]] | None:
        if modality != "image" or "pixel_values" not in found:
            return None
        config = self.info.get_hf_config()
        usual = served_of(config, getattr(config, WORD)).usual
        return [[usual]] * len(found["pixel_values"])


@MULTIMODAL_REGISTRY.register_processor(
    LlavaProcessor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class VlmPruneLlavaForConditionalGeneration(LlavaForConditionalGeneration):  # type: ignore[misc]
    """vLLM's LLaVA, whose images enter the LLM with the tokens that the method keeps."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        served = served_of(config, getattr(config, WORD))
        check_engine(vllm_config, served)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self._served = served

    def embed_multimodal(self, **kwargs: Any) -> Any:
        keeps, texts = (kwargs.pop(f"{word}_image", None) for word in (KEEP, TEXT))
        if keeps is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        pixels = self._parse_and_validate_image_input(**kwargs)["pixel_values"]
        with reading(self.vision_tower, self._served.needs) as read:
            rows = self.vision_tower(pixels, feature_select_strategy="full")
        prefix = self._served.shape.tower.prefix
        patches = rows[:, prefix:]
        features = self.multi_modal_projector(patches)
        found = {Features(): features, EncoderFeatures(): patches, ClsFeatures(): rows[:, :1]}
        found |= {need: values[:, prefix:] for need, values in read.items()}
        counts = torch.as_tensor(keeps).flatten().tolist()
        words = embedded(self.language_model, texts, len(counts), features.device)
        return [
            self._rows(keep, features[i], {need: found[need][i] for need in found} | words[i])
            for i, keep in enumerate(counts)
        ]

    def _rows(self, keep: int, features: Tensor, found: Mapping[Signal, Tensor]) -> Tensor:
        """The rows of one image that enter the LLM: (keep, D)."""
        if keep == len(features):
            return features
        signals = {need: found[need] for need in self._served.needs}
        chosen = self._served.choose(self._served.usual, signals, features, keep)
        emitted = chosen.emit(features, lambda own: self.multi_modal_projector(own[None])[0])
        return emitted[chosen.slots]
