"""What image encoders of `transformers` have in common where they are models of their own."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from ..encoder import Encoder, EncoderBlock
from ..image_model import ImageModel, weigh


class TransformersEncoder(Encoder):
    """Blocks whose attention has a `v_proj` of its own."""

    def values(self, block: EncoderBlock, rows: Tensor) -> Tensor:
        attention = block.attention
        projected = attention.v_proj(block.norm1(rows))
        return rearrange(projected, "b s (h d) -> b h s d", d=attention.head_dim)


class TransformersModel(ImageModel):
    means: ClassVar[Collection[str]] = ()
    """Classes whose head takes the mean over all patches."""

    def __init__(self, model: Any, found: str) -> None:
        super().__init__(model, found)
        while (inner := getattr(self.tower, "vision_model", None)) is not None:
            self.tower = inner

    @property
    def width(self) -> int:
        return int(self.tower.config.hidden_size)

    @property
    def patch(self) -> tuple[int, int]:
        """Rows and columns of pixels of a patch."""
        return _pair(self.tower.config.patch_size)

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        return pixels.shape[-2] // self.patch[0], pixels.shape[-1] // self.patch[1]

    @property
    def fixed_grid(self) -> tuple[int, int] | None:
        rows, columns = _pair(self.tower.config.image_size)
        return rows // self.patch[0], columns // self.patch[1]

    @property
    def checkpointing(self) -> bool:
        return self.tower.training and any(
            getattr(block.module, "gradient_checkpointing", False) for block in self.encoder.blocks
        )

    def weighed(self, output: Any, bias: Tensor) -> Any:
        if self.found in self.means:
            rows = output.last_hidden_state
            output.last_hidden_state = weigh(rows, bias, self.encoder.prefix)
        return output


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
