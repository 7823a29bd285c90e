"""LLaVA-1.5 in vLLM: shorter placeholders, and the choice behind the projector."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from ....prune.contract import ClsFeatures, EncoderFeatures, Features, Signal
from ..engine import check_engine
from ..served import OF_ATTENTION, WORD, requested
from ..sizes import served_of
from ..versions import check_version

check_version()

from vllm.model_executor.models.llava import (  # noqa: E402
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProcessor,
    LlavaProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # noqa: E402
from vllm.multimodal.inputs import MultiModalFieldConfig  # noqa: E402
from vllm.multimodal.parse import ImageEmbeddingItems, ImageProcessorItems  # noqa: E402
from vllm.multimodal.processing import PromptReplacement  # noqa: E402

KEEP = f"{WORD}_keep"
"""The field that brings each image's count to the model."""


class Processor(LlavaMultiModalProcessor):  # type: ignore[misc]
    """Placeholders as many as tokens are kept. The options are among the processor's arguments, so
    that all caches tell one budget from another."""

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        given = inputs.hf_processor_mm_kwargs
        options = requested(getattr(self.info.get_hf_config(), WORD), given.get(WORD))
        arguments = {**given, WORD: dict(options)}
        return super().apply(replace(inputs, hf_processor_mm_kwargs=arguments), timing_ctx)

    def _keep(self, arguments: Mapping[str, Any]) -> int:
        served = served_of(self.info.get_hf_config(), arguments[WORD])
        return served.keep(served.usual)

    def _call_hf_processor(self, hf_data: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        theirs = {word: value for word, value in hf_kwargs.items() if word != WORD}
        return super()._call_hf_processor(hf_data, theirs)

    def _postprocess_hf_mm_data(
        self, mm_inputs: Any, hf_processor_mm_kwargs: Any, processed_data: Any
    ) -> Any:
        processed = super()._postprocess_hf_mm_data(
            mm_inputs, hf_processor_mm_kwargs, processed_data
        )
        if "pixel_values" in processed:
            images = len(processed["pixel_values"])
            processed[KEEP] = torch.full((images,), self._keep(hf_processor_mm_kwargs))
        return processed

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Any
    ) -> Mapping[str, Any]:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, KEEP: MultiModalFieldConfig.batched("image", keep_on_cpu=True)}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any
    ) -> Sequence[Any]:
        token = self.info.get_hf_config().image_token_index

        def placeholders(index: int) -> list[int]:
            images = mm_items.get_items("image", (ImageEmbeddingItems, ImageProcessorItems))
            if isinstance(images, ImageEmbeddingItems):  # the caller has pruned them, or not
                return [token] * images.get_feature_size(index)
            return [token] * self._keep(hf_processor_mm_kwargs)

        return [PromptReplacement(modality="image", target=[token], replacement=placeholders)]


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=LlavaProcessingInfo, dummy_inputs=LlavaDummyInputsBuilder
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
        keeps = kwargs.pop(KEEP, None)
        if keeps is None or kwargs.get("pixel_values") is None:
            return super().embed_multimodal(**kwargs)
        pixels = self._parse_and_validate_image_input(**kwargs)["pixel_values"]
        read: dict[Signal, Tensor] = {}
        with self._reading(read):
            rows = self.vision_tower(pixels, feature_select_strategy="full")
        prefix = self._served.shape.tower.prefix
        patches = rows[:, prefix:]
        features = self.multi_modal_projector(patches)
        found = {Features(): features, EncoderFeatures(): patches, ClsFeatures(): rows[:, :1]}
        found |= {need: values[:, prefix:] for need, values in read.items()}
        counts = torch.as_tensor(keeps).flatten().tolist()
        return [self._rows(i, keep, features[i], found) for i, keep in enumerate(counts)]

    def _rows(
        self, index: int, keep: int, features: Tensor, found: Mapping[Signal, Tensor]
    ) -> Tensor:
        """The rows of one image that enter the LLM: (keep, D)."""
        if keep == len(features):
            return features
        signals = {need: found[need][index] for need in self._served.needs}
        chosen = self._served.choose(self._served.usual, signals, features, keep)
        own = chosen.selection.features
        if own is not None and not chosen.selection.projected:
            own = self.multi_modal_projector(own.to(features.dtype)[None])[0]
        return chosen.emit(features, own)[chosen.slots]

    @contextmanager
    def _reading(self, read: dict[Signal, Tensor]) -> Iterator[None]:
        """Read what the method declared of the encoder's attention: (B, S, ...) each."""
        layers = self.vision_tower.vision_model.encoder.layers
        needs: tuple[Any, ...] = self._served.needs  # those of attention have a layer
        with ExitStack() as hooks:
            for need in needs:
                if (reader := OF_ATTENTION.get(type(need))) is None:
                    continue
                attention = layers[need.layer].self_attn

                def hook(
                    module: Any,
                    args: Any,
                    output: Any,
                    need: Any = need,
                    attention: Any = attention,
                    reader: Any = reader,
                ) -> None:
                    heads = {"three": 3, "d": attention.head_dim}
                    split = rearrange(output[0], "b s (three h d) -> three b h s d", **heads)
                    query, key, _ = split
                    read[need] = reader(query, key, attention.scale)

                hooks.callback(attention.qkv_proj.register_forward_hook(hook).remove)
            yield
