"""Qwen3-VL in vLLM: features for the first layers of the decoder, and frames behind timestamps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .mrope import GridProcessor, PrunedModel
from .processor import KEEP

from vllm.model_executor.models.qwen3_vl import (  # isort: skip  (behind the version's check)
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY  # isort: skip
from vllm.multimodal.processing import PromptUpdateDetails  # isort: skip


class TimestampedProcessor(GridProcessor, Qwen3VLMultiModalProcessor):  # type: ignore[misc]
    """A video's kept tokens are not counted by frame before it is encoded: its part of the prompt
    is one run of rows, of text and of tokens, which the model puts in order."""

    def _marked(self, ids: Sequence[int]) -> Sequence[int]:
        """Each frame of a video has its own end, in front of the video's."""
        config = self.info.get_hf_config()
        video, end = config.video_token_id, config.vision_end_token_id
        return [new for one in ids for new in ((one, end) if one == video else (one,))]

    def _placeholders(self, update: Any, fields: Any, index: int) -> Any:
        keep = fields[update.modality][index].get(f"{KEEP}_{update.modality}")
        if update.modality == "image" or keep is None:
            return super()._placeholders(update, fields, index)
        whole = update.replacement(index).full
        visual = self.info.get_hf_config().video_token_id
        first = whole.index(visual)
        rest = [token for token in whole[first:] if token != visual]
        return PromptUpdateDetails.from_seq([*whole[:first], *[visual] * int(keep.data), *rest])


class Timestamped(PrunedModel):
    """Of Qwen3-VL's line."""

    fields = (*PrunedModel.fields, "timestamps")
    _tokenizer: Any

    def _tokens(self, item: Any) -> list[int]:
        tokens = super()._tokens(item)
        if item.modality == "image":
            return tokens
        frames = int(item.data["video_grid_thw"].data[0])
        whole: list[int] = Qwen3VLMultiModalProcessor.get_video_repl(
            tokens_per_frame=[len(tokens) // frames] * frames,
            timestamps=item.data["timestamps"].data,
            tokenizer=self._tokenizer,
            vision_start_token_id=self.config.vision_start_token_id,
            vision_end_token_id=self.config.vision_end_token_id,
            video_token_id=self.config.video_token_id,
        ).full
        return whole


@MULTIMODAL_REGISTRY.register_processor(
    TimestampedProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class VlmPruneQwen3VLForConditionalGeneration(Timestamped, Qwen3VLForConditionalGeneration):  # type: ignore[misc]
    """vLLM's Qwen3-VL with pruned images and videos."""
