"""Gemma 3: one SigLIP square averaged down, tokens of an image that see each other both ways."""

from __future__ import annotations

from collections.abc import Sequence

from einops import rearrange, reduce
from torch import Tensor

from ...prune.tiling import Tiling
from ..both_ways import BothWays
from ..family import Call, Inputs
from ..merged import Merged


class Gemma3(Merged):
    """Crops of pan-and-scan come as images of their own, with text between them."""

    name = "gemma3"
    makes_masks = True

    def both_ways(self, inputs: Inputs) -> BothWays | None:
        from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

        kinds = inputs.get("token_type_ids")
        return None if kinds is None else BothWays(get_block_sequence_ids_for_mask(kinds))

    @property
    def step(self) -> int:
        return int(self.core.multi_modal_projector.kernel_size)

    def tilings(self, call: Call, features: Sequence[Tensor]) -> Sequence[Tiling]:
        return [Tiling.single(*grid) for (grid,) in self.pictures(call)]

    def pixels(self, call: Call) -> Sequence[Tensor]:
        return call.inputs["pixel_values"].split(1)

    def pictures(self, call: Call) -> Sequence[Sequence[tuple[int, int]]]:
        return [[(self.side, self.side)]] * len(call.inputs["pixel_values"])

    def project(self, rows: Tensor) -> Tensor:
        projector = self.core.multi_modal_projector
        pooled = reduce(rows, "n (u c) -> n c", "mean", u=self.tower.merge_unit)
        weight: Tensor = projector.mm_input_projection_weight
        return (projector.mm_soft_emb_norm(pooled) @ weight).type_as(rows)

    def units(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        cells, step = "b (h i w j) ... -> b (h w) (i j) ...", self.step
        return list(rearrange(values, cells, h=self.side, w=self.side, i=step, j=step))

    @property
    def side(self) -> int:
        """Rows and columns of tokens of an image."""
        return int(self.core.multi_modal_projector.tokens_per_side)

    @property
    def fixed_tokens(self) -> int:
        return self.side**2
