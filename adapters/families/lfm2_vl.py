"""LFM2-VL: SigLIP 2 on pictures of any size, padded in a batch; most layers are convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ...prune.contract import ModelShape
from ...prune.errors import UnsupportedFeatureError
from ..any_size import AnySize
from ..family import Call, Modality
from ..layer_names import LayerNames
from ..sequence.prompt import Prompt


class Lfm2Vl(AnySize):
    """An image is one picture, or tiles and the whole picture last. Encoded without a prompt, each
    of these counts as an image."""

    name = "lfm2_vl"
    of_prompt = True
    layer_names = LayerNames(
        norm="operator_norm",
        head_norm="{}_layernorm",
        mlp="feed_forward",
        down="w2",
        last_norm="embedding_norm",
    )

    @property
    def step(self) -> int:
        return int(self.model.config.downsample_factor)

    @property
    def shape(self) -> ModelShape:
        """MLPs may be narrower than the configuration's `intermediate_size`."""
        whole, width = super().shape, self.text_model.layers[0].feed_forward.w2.in_features
        return replace(whole, decoder=replace(whole.decoder, intermediate_size=width))

    # --- which pictures are an image -----------------------------------------------------------

    def parts(self, call: Call, prompt: Prompt) -> tuple[int, ...]:
        """Between pictures of an image is one mark, or nothing; images end and begin with marks."""
        todo, found = self._tokens(call), list[int]()
        for ids in prompt.rows():
            columns = (ids == prompt.placeholders[call.modality]).nonzero()[:, 0].tolist()
            last = None
            while columns:
                count = todo.pop(0) if todo else 0
                if not 0 < count <= len(columns):
                    raise _unlike(f"{len(columns)} placeholders are left in a prompt", count)
                if last is not None and columns[0] - last <= 2:
                    found[-1] += 1
                else:
                    found.append(1)
                last = columns[count - 1]
                del columns[:count]
        if todo:
            raise _unlike("no placeholders are left", todo[0])
        return tuple(found)

    def counts(self, call: Call) -> Sequence[int]:
        pictures = len(call.inputs["spatial_shapes"])
        return (1,) * pictures if call.parts is None else call.parts

    def whole(self, grids: Sequence[tuple[int, int]]) -> int | None:
        """The last picture of an image where it is the whole one, which some processors do not add:
        it has the image's proportions and tiles are alike, so that it is like them only where the
        image is a square, of as many tiles each way."""
        last = len(grids) - 1
        whole = last > 0 and (grids[last] != grids[0] or math.isqrt(last) ** 2 == last > 1)
        return last if whole else None

    def images(self, call: Call, pooled: Sequence[Tensor]) -> Sequence[Tensor]:
        return self.joined(call, pooled)

    def pooled(self, call: Call, images: Sequence[Tensor], kind: type) -> Any:
        return list(torch.cat(list(images)).split(self._tokens(call)))

    # --- what is where -------------------------------------------------------------------------

    def _sizes(self, call: Call) -> list[tuple[int, int]]:
        """Rows and columns of patches of each picture."""
        return [(rows, columns) for rows, columns in call.inputs["spatial_shapes"].tolist()]

    def grids(self, call: Call) -> Sequence[tuple[int, int]]:
        return [(rows // self.step, columns // self.step) for rows, columns in self._sizes(call)]

    def _tokens(self, call: Call) -> list[int]:
        return [rows * columns for rows, columns in self.grids(call)]

    def patches(self, call: Call, values: Tensor) -> Sequence[Tensor]:
        seen = zip(values, self._sizes(call), strict=True)
        return [own[: rows * columns] for own, (rows, columns) in seen]

    def project(self, rows: Tensor) -> Tensor:
        projector = self.core.multi_modal_projector
        rows = projector.layer_norm(rows) if projector.use_layer_norm else rows
        projected: Tensor = projector.linear_2(projector.act(projector.linear_1(rows)))
        return projected

    def sizes(self, modality: Modality) -> str:
        return "spatial_shapes"

    def per_picture(self, modality: Modality) -> frozenset[str]:
        return super().per_picture(modality) | {"pixel_attention_mask"}


def _unlike(placeholders: str, tokens: int) -> UnsupportedFeatureError:
    return UnsupportedFeatureError(
        f"{placeholders} for a picture of {tokens} tokens: input_ids and spatial_shapes do not "
        f"belong together; make both with the model's own processor."
    )
