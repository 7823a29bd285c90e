"""The text that belongs to an image, which comes to the model as a field of it.

vLLM encodes images without their prompt, and takes from its caches what has the same hash. Where a
method reads the question, the ids of an image's text are part of its hash, also of the same image
twice in one prompt, and the model embeds them as it embeds a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor

from ....prune.contract import Signal, TextEmbeddings
from ....prune.errors import UnsupportedFeatureError
from ...modality import MODALITIES
from ...sequence.prompt import Prompt
from ..served import WORD

from vllm.multimodal.parse import MultiModalDataItems  # isort: skip  (behind the version's check)
from vllm.multimodal.processing.inputs import ProcessorInputs  # isort: skip

TEXT = f"{WORD}_text"
"""Before the modality's name: the field that brings the ids of each item's text to the model."""
Texts = Mapping[str, Sequence[Sequence[int]]]
"""Of each modality, the ids of each item's text."""


class Items(MultiModalDataItems):  # type: ignore[misc]
    """Items of a prompt, with the text that belongs to each."""

    texts: Texts

    @classmethod
    def of(cls, items: Any, texts: Texts) -> Items:
        found = cls(items.data)
        found.texts = texts
        return found


class Asked(ProcessorInputs):  # type: ignore[misc]
    """A prompt whose items are known by their text too. In it `mm_data_items` are `Items`."""

    @classmethod
    def of(cls, inputs: Any, config: Any, ids: Sequence[int]) -> Asked:
        """
        Args:
            ids: of the prompt, one placeholder for each item.

        Raises:
            UnsupportedFeatureError: the prompt has not one placeholder for each item.
        """
        tokens = {one: getattr(config, one.token, None) for one in MODALITIES}
        known = {one: token for one, token in tokens.items() if token is not None}
        prompt = Prompt(torch.tensor([ids]), None, known)
        items, texts = inputs.mm_data_items, {}
        for one in (one for one in known if one.name in items):
            count, places = items.get_count(one.name), list(ids).count(known[one])
            if places != count:
                raise UnsupportedFeatureError(
                    f"The prompt has {places} placeholders for {count} {one.name}s, so that nobody "
                    f"knows which text belongs to which: give it one for each."
                )
            texts[one.name] = [text.tolist() for text in prompt.texts(one, [1] * count)]
        given = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
        return cls(**{**given, "mm_data_items": Items.of(items, texts)})

    def get_mm_hashes(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        hashes: dict[str, list[str]] = super().get_mm_hashes(*args, **kwargs)
        return {
            modality: [
                sha256(f"{one} {text}".encode()).hexdigest()
                for one, text in zip(found, self.mm_data_items.texts.get(modality, ()), strict=True)
            ]
            for modality, found in hashes.items()
        }


class Asking:
    """Of a processor: what it still has to read of a prompt goes on with its text."""

    def _marked(self, ids: Sequence[int]) -> Sequence[int]:
        """A prompt, with the marks that are put around its items: they are text between these."""
        return ids

    def _get_cache_missing_items(
        self, cache: Any, mm_data_items: Any, mm_hashes: Any
    ) -> tuple[Any, Any]:
        cached, missing = super()._get_cache_missing_items(  # type: ignore[misc]
            cache, mm_data_items, mm_hashes
        )
        if not isinstance(mm_data_items, Items):
            return cached, missing
        texts = {
            modality: [
                text for text, known in zip(found, cached[modality], strict=True) if not known
            ]
            for modality, found in mm_data_items.texts.items()
        }
        return cached, Items.of(missing, texts)


def ids_of(items: Any, modality: str) -> list[Tensor]:
    """The field: the ids of the text of each of `Items`, (T,) int64."""
    return [torch.tensor(text, dtype=torch.int64) for text in items.texts[modality]]


def embedded(
    decoder: Any, texts: Sequence[Tensor] | None, count: int, device: torch.device
) -> Sequence[dict[Signal, Tensor]]:
    """What is read of the text of each of `count` items; nothing where they come without."""
    if texts is None:
        return [{}] * count
    ids = torch.cat(list(texts)).to(device)
    rows = decoder.embed_input_ids(ids).split([len(text) for text in texts])
    return [{TextEmbeddings(): one} for one in rows]
