"""Ovis 2: AIMv2 tiles, the whole picture first, as mixtures of rows of a table of visual words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from ...prune.errors import UnsupportedModelError
from ..family import Call
from ..tiled import Tiled


class Ovis2(Tiled):
    name = "ovis2"
    whole_picture = "first"
    beside = ("visual_indicator_features",)  # the embeddings of the marks between tiles

    @property
    def vision_attention(self) -> Sequence[Any]:
        return [layer.attention for layer in self.vision_tower.transformer.encoder.layers]

    @property
    def projectors(self) -> Sequence[Any]:
        return [self.vision_tower.head_linear, self.core.visual_embeddings_table]

    @property
    def step(self) -> int:
        return int(self.vision_tower.config.hidden_stride)

    def separates(self, gap: Sequence[int], behind: Sequence[int]) -> bool:
        """One mark follows every tile; between images is that of the next one's beginning, too."""
        return len(gap) > 1

    def encoder_features(self, call: Call, output: Any) -> Tensor:
        """Patches, of which the model has laid those of a token side by side."""
        (_, columns), step = self.grid(call), self.step
        return rearrange(
            output.last_hidden_state,
            "t (r c) (i j d) -> t (r i c j) d",
            c=columns,
            i=step,
            j=step,
        )

    def project(self, rows: Tensor) -> Tensor:
        tower = self.vision_tower
        words = tower.head_norm(tower.head_linear(rows)).softmax(-1)
        marks = tower.config.num_visual_indicator_tokens
        projected: Tensor = self.core.visual_embeddings_table(pad(words, (0, marks)))
        return projected

    def check(self) -> None:
        """Tokens that are one visual word, drawn or the likeliest, instead of a mixture."""
        how = self.vision_tower.config.tokenize_function
        if how != "softmax":
            raise UnsupportedModelError(
                f"tokenize_function={how!r}: tokens that are one visual word each cannot be "
                f'merged: set model.config.vision_config.tokenize_function = "softmax".'
            )
