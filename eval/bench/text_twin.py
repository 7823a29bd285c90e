"""A CLIP text encoder with random weights, for methods that compare image and question in its
space: as large as the one that belongs to CLIP-L."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import CLIPConfig, CLIPModel

from ...adapters.clip_text import ClipText

_WIDTH, _VOCABULARY = 768, 49408


def random_text_twin(vision: Any, *, device: str, dtype: torch.dtype) -> ClipText:
    """The text encoder of a tower with the configuration `vision`.

    Its own tower has one layer: nothing but its projection is used.
    """
    config = CLIPConfig(
        text_config={
            "hidden_size": _WIDTH,
            "intermediate_size": 4 * _WIDTH,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": _WIDTH,
            "vocab_size": _VOCABULARY,
        },
        vision_config={**vision.to_dict(), "num_hidden_layers": 1, "projection_dim": _WIDTH},
        projection_dim=_WIDTH,
    )
    with torch.device(device):
        clip = CLIPModel(config).to(dtype)
    return ClipText(clip, _Numbers(), _Numbers())


class _Numbers:
    """A tokenizer whose words are numbers."""

    def decode(self, ids: torch.Tensor, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids.tolist()))

    def __call__(self, text: str, truncation: bool) -> Any:
        words = [int(word) % (_VOCABULARY - 2) for word in text.split()]
        return SimpleNamespace(input_ids=[_VOCABULARY - 2, *words, _VOCABULARY - 1])
