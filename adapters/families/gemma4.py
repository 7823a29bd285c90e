"""Gemma 4: pictures of any size, whose encoder averages patches itself, and videos with times."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ...prune.contract import Tower
from ...prune.errors import UnsupportedModelError
from ..any_size import AnySize
from ..both_ways import BothWays
from ..family import IMAGE, VIDEO, Call, Inputs, Modality

_FRAMES = "num_frames_per_video"


class Gemma4(AnySize):
    """A token is the mean of a square of patches; frames of a video are its pictures."""

    name = "gemma4"
    modalities = (IMAGE, VIDEO)
    makes_masks = True
    by_token = ("per_layer_inputs",)

    def both_ways(self, inputs: Inputs) -> BothWays | None:
        """In sliding layers only, of the larger models."""
        from transformers.models.gemma4.modeling_gemma4 import get_block_sequence_ids_for_mask

        kinds = inputs.get("mm_token_type_ids")
        if kinds is None or self.text_model.config.use_bidirectional_attention != "vision":
            return None
        blocks = get_block_sequence_ids_for_mask(kinds, kinds.device)
        return BothWays(blocks, frozenset({"sliding_attention"}))

    def check(self) -> None:
        """Those whose text sees what is behind it."""
        if self.text_model.config.use_bidirectional_attention == "all":
            raise UnsupportedModelError(
                "The text of this Gemma 4 sees what is behind it (use_bidirectional_attention="
                '"all"), and masks of a shortened prompt do not know that: use a generative Gemma '
                "4, or a Gemma 3."
            )

    @property
    def step(self) -> int:
        return int(self.vision_tower.config.pooling_kernel_size)

    @property
    def tower(self) -> Tower:
        return replace(super().tower, rotary=True)

    @property
    def projectors(self) -> Sequence[Any]:
        return [self.core.embed_vision]

    def sizes(self, modality: Modality) -> str:
        """The column and row of each patch, (pictures, patches, 2); -1: padding."""
        return f"{modality.name}_position_ids"

    def counts(self, call: Call) -> Sequence[int]:
        if call.modality is VIDEO:
            return call.inputs[_FRAMES].tolist()  # type: ignore[no-any-return]
        return (1,) * len(call.inputs[IMAGE.pixels])

    def per_image_arguments(self, modality: Modality) -> frozenset[str]:
        return super().per_image_arguments(modality) | {_FRAMES}

    def only(self, call: Call, images: Sequence[int]) -> tuple[Sequence[int], Call]:
        images, some = super().only(call, images)
        if call.modality is VIDEO:
            frames = call.inputs[_FRAMES][list(images)]
            some = replace(some, inputs={**some.inputs, _FRAMES: frames})
        return images, some

    def grids(self, call: Call) -> Sequence[tuple[int, int]]:
        far = call.inputs[self.sizes(call.modality)].amax(1) + 1
        return [(y // self.step, x // self.step) for x, y in far.tolist()]

    def patches(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        places = call.inputs[self.sizes(call.modality)].to(values.device)
        found = []
        for own, at in zip(values, places, strict=True):
            real = at.amin(-1) >= 0
            x, y = at[real].unbind(-1)
            found.append(own[real][(y * (x.amax() + 1) + x).argsort()])
        return found

    def encoder_features(self, call: Call, output: Any) -> Tensor:
        """Pooled already, without padding: one row a token, of all pictures."""
        hidden: Tensor = output.last_hidden_state
        return hidden[None]

    def merged_patches(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        return values[0].split([sum(r * c for r, c in own) for own in self.pictures(call)])

    def project(self, rows: Tensor) -> Tensor:
        projected: Tensor = self.core.embed_vision(inputs_embeds=rows)
        return projected

    def turned(self, attention: Any, heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Which are turned one at a time."""
        turn = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        turned: Tensor = turn(heads, *rotary)
        return turned
