"""vLLM's processor of any family, with placeholders as many as tokens are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ....prune.tiling import Tiling
from ..served import WORD, requested
from ..sizes import served_of
from ..versions import check_version

check_version()

from .questions import TEXT, Asked, Asking, ids_of  # noqa: E402

from vllm.multimodal.inputs import MultiModalFieldConfig  # isort: skip  # noqa: E402
from vllm.multimodal.processing import PromptReplacement  # noqa: E402

MODALITIES = ("image", "video")
KEEP = f"{WORD}_keep"
"""Before the modality's name: the field that brings each item's count to the model."""


class Processor(Asking, ABC):
    """Placeholders as many as tokens are kept. The options are among the processor's arguments, so
    that all caches tell one budget from another, and questions too where the method reads them."""

    info: Any

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        given = inputs.hf_processor_mm_kwargs
        options = requested(getattr(self.info.get_hf_config(), WORD), given.get(WORD))
        inputs = replace(inputs, hf_processor_mm_kwargs={**given, WORD: dict(options)})
        config = self.info.get_hf_config()
        if served_of(config, options).asks:
            inputs = Asked.of(inputs, config, self._marked(inputs.prompt))
        return super().apply(inputs, timing_ctx)  # type: ignore[misc]

    def _apply_hf_processor_main(self, mm_items: Any, hf_kwargs: Mapping[str, Any]) -> Any:
        """The fields of vLLM, and the count of each item that comes as pixels."""
        found = super()._apply_hf_processor_main(mm_items, _theirs(hf_kwargs))  # type: ignore[misc]
        served = served_of(self.info.get_hf_config(), hf_kwargs[WORD])
        for modality in MODALITIES:
            tilings = self._tilings(modality, found)
            if tilings is not None:
                keeps = [sum(map(served.keep, item)) for item in tilings]
                found[f"{KEEP}_{modality}"] = torch.tensor(keeps)
                if served.asks:
                    found[f"{TEXT}_{modality}"] = ids_of(mm_items, modality)
        return found

    @abstractmethod
    def _tilings(
        self, modality: str, found: Mapping[str, Any]
    ) -> Sequence[Sequence[Tiling]] | None:
        """How the tokens of each item lie, one or several that the method sees as images of their
        own; None: none comes as pixels."""

    def _get_mm_fields_config(
        self, hf_inputs: Any, hf_processor_mm_kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        theirs = _theirs(hf_processor_mm_kwargs)
        fields = super()._get_mm_fields_config(hf_inputs, theirs)  # type: ignore[misc]
        ours = {
            f"{word}_{modality}": MultiModalFieldConfig.batched(modality, keep_on_cpu=True)
            for modality in MODALITIES
            for word in (KEEP, TEXT)
        }
        return {**fields, **ours}

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[Any]:
        theirs = _theirs(hf_processor_mm_kwargs)
        updates = super()._get_prompt_updates(mm_items, theirs, out_mm_kwargs)  # type: ignore[misc]
        return [
            PromptReplacement(
                modality=update.modality,
                target=update.target,
                replacement=partial(self._placeholders, update, out_mm_kwargs),
            )
            for update in updates
        ]

    def _placeholders(self, update: Any, fields: Any, index: int) -> Any:
        """What stands in the prompt for one item."""
        whole = update.replacement(index)
        keep = fields[update.modality][index].get(f"{KEEP}_{update.modality}")
        return whole if keep is None else whole[: int(keep.data)]


def _theirs(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {word: value for word, value in arguments.items() if word != WORD}
