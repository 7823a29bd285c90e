"""The text encoder that a CLIP vision tower was trained with, for methods that compare the two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..prune.errors import UnsupportedModelError


class ClipText:
    """Questions and image patches in CLIP's joint space.

    Build it from the checkpoint that the model's vision tower comes from:
    `ClipText.from_pretrained("openai/clip-vit-large-patch14-336", processor)` for LLaVA-1.5.

    Args:
        clip: a `transformers.CLIPModel`.
        clip_tokenizer: its tokenizer.
        processor: the VLM's processor (or tokenizer), which turns the prompt back to text. What
            its chat template puts behind the user's words is cut off.
    """

    def __init__(self, clip: Any, clip_tokenizer: Any, processor: Any) -> None:
        if not hasattr(clip, "text_projection"):
            raise UnsupportedModelError(
                f"{type(clip).__name__} has no text projection: give a transformers.CLIPModel."
            )
        self._clip, self._clip_tokenizer = clip.eval(), clip_tokenizer
        self._tokenizer = getattr(processor, "tokenizer", processor)
        self._tail = self._template_tail(processor)

    @classmethod
    def from_pretrained(cls, name: str | Path, processor: Any, **kwargs: Any) -> ClipText:
        """Load a CLIP checkpoint, a folder or a hub name; `kwargs` go to `CLIPModel`."""
        from transformers import AutoTokenizer, CLIPModel

        clip = CLIPModel.from_pretrained(name, **kwargs)
        return cls(clip, AutoTokenizer.from_pretrained(name), processor)

    def to(self, device: str | torch.device) -> ClipText:
        """Move the weights, in place."""
        self._clip.to(device)
        return self

    @property
    def vision_width(self) -> int:
        """C of the vision tower that belongs to the text encoder."""
        return int(self._clip.config.vision_config.hidden_size)

    def image(self, features: Tensor) -> Tensor:
        """Encoder features (B, S, C) in the joint space: (B, S, D_clip)."""
        weight = self._clip.visual_projection.weight
        normed = self._clip.vision_model.post_layernorm(features.to(weight))
        return self._clip.visual_projection(normed).float().to(features.device)  # type: ignore[no-any-return]

    def text(self, ids: Tensor) -> Tensor:
        """Token ids of the VLM (T,) as text in the joint space, a row per segment: (M, D_clip).

        Longer texts are cut into segments of the encoder's length, the last one padded with 0.
        """
        length = self._clip.config.text_config.max_position_embeddings
        words = self._clip_tokenizer(self.question(ids), truncation=False).input_ids
        tokens = torch.tensor(words, device=self._clip.device)
        segments = pad(tokens, (0, -len(tokens) % length)).view(-1, length)
        pooled = self._clip.text_model(input_ids=segments).pooler_output
        return self._clip.text_projection(pooled).float().to(ids.device)  # type: ignore[no-any-return]

    def question(self, ids: Tensor) -> str:
        """The user's words in token ids of the VLM (T,)."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        return text.removesuffix(self._tail).strip()

    def _template_tail(self, processor: Any) -> str:
        """What the chat template writes between the user's words and the answer."""
        if not getattr(processor, "chat_template", None):
            return ""
        mark = "vlmprune"
        message = {"role": "user", "content": [{"type": "text", "text": mark}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
        ids = self._tokenizer(text.rpartition(mark)[2], add_special_tokens=False).input_ids
        tail: str = self._tokenizer.decode(ids, skip_special_tokens=True).strip()
        return tail
