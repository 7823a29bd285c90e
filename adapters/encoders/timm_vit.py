"""timm's `VisionTransformer`: ViT, DeiT, registers, layer scale, norms of queries and keys."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, ClassVar

from torch import Tensor

from ...prune.errors import UnsupportedModelError
from ..encoder import Bias, Encoder, EncoderBlock
from ..hooks import Undo
from ..image_model import ImageModel, Keywords, unlike, weigh
from ..tap import Exchange, Listener, Names
from .mixed import values_alone
from .timm_tap import TimmTap, mixes

_ATTENTION = ("Attention", "AttentionRope", "EvaAttention")
"""Those whose queries and keys pass `q_norm` and `k_norm` as they go into the kernel."""


class TimmEncoder(Encoder):
    """
    Args:
        tower: a `VisionTransformer`, or another with blocks like it.
    """

    def __init__(self, tower: Any) -> None:
        self._tower = tower
        self.prefix = int(tower.num_prefix_tokens)

    @cached_property
    def blocks(self) -> Sequence[EncoderBlock]:
        return [
            EncoderBlock(block, block.norm1, block.attn, block.norm2, tail=block.drop_path2)
            for block in self._tower.blocks
        ]

    def values(self, block: EncoderBlock, rows: Tensor) -> Tensor:
        return values_alone(block.attention, block.norm1(rows))

    def tap(
        self,
        block: EncoderBlock,
        names: Names,
        listener: Listener,
        exchange: Exchange,
        bias: Bias,
    ) -> Undo:
        return TimmTap(block.attention, listener, exchange, bias).remove

    def name_tap(self, block: EncoderBlock, names: Names) -> None:
        """Its hooks have no name."""

    def attention_of(self, block: EncoderBlock) -> str:
        return "sdpa" if block.attention.fused_attn else "eager"


class TimmVit(ImageModel):
    library = "timm.models."
    classes: ClassVar = {"VisionTransformer": ""}
    entry = "forward_features"
    full: ClassVar = ("forward_intermediates",)
    pixels = "x"
    crops = True
    masks: ClassVar = ("attn_mask", "is_causal")

    @cached_property
    def encoder(self) -> Encoder:
        return TimmEncoder(self.tower)

    @property
    def width(self) -> int:
        return int(self.tower.embed_dim)

    @property
    def has_cls(self) -> bool:
        return self.tower.cls_token is not None

    def grid(self, pixels: Tensor) -> tuple[int, int]:
        rows, columns = self.tower.patch_embed.dynamic_feat_size(tuple(pixels.shape[-2:]))
        return int(rows), int(columns)

    @property
    def fixed_grid(self) -> tuple[int, int] | None:
        tower = self.tower
        if getattr(tower, "dynamic_img_size", False):
            return None
        rows, columns = tower.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def checkpointing(self) -> bool:
        return bool(self.tower.grad_checkpointing)

    def check(self) -> None:
        for number, block in enumerate(self.tower.blocks):
            attention = block.attn
            kind = type(attention).__name__
            if kind not in _ATTENTION or not type(attention).__module__.startswith("timm."):
                raise unlike(
                    self.model,
                    f"the attention of block {number} is of class {kind}, and that of "
                    f"{', '.join(_ATTENTION)} is known",
                )
            if "attn_mask" not in inspect.signature(attention.forward).parameters:
                raise unlike(
                    self.model,
                    f"{kind} of the installed timm takes no attn_mask, which rows of several "
                    f'patches need: pip install -U "timm>=1.0.16"',
                )
        pool = self.attention_pool
        if pool is not None and getattr(pool, "pos_embed", None) is not None:
            raise unlike(
                self.model, "its attention pooling adds positions, and so needs every patch"
            )

    def check_values(self, name: str) -> None:
        if not all(mixes(block.attention) for block in self.encoder.blocks):
            kind = type(self.encoder.blocks[0].attention).__name__
            raise UnsupportedModelError(
                f"{name} lets attention read the values of merged rows, and {kind} does not make "
                f"them in one module with queries and keys: use another method on this model."
            )

    def check_pooling(self, name: str) -> None:
        pool = self.attention_pool
        if pool is None or "attn_mask" in inspect.signature(pool.forward).parameters:
            return
        raise unlike(
            self.model,
            f"its pooling, {type(pool).__name__}, takes no attn_mask, which the merged rows of "
            f"{name} need",
        )

    @property
    def pooling(self) -> Callable[..., Any]:
        return self.tower.pool

    @property
    def attention_pool(self) -> Any:
        return getattr(self.tower, "attn_pool", None)

    def biased(self, kwargs: Keywords, bias: Tensor, rows: Tensor) -> Keywords:
        return {**kwargs, "attn_mask": bias[..., -rows.shape[1] :].to(rows.dtype)}

    def pools_by_size(
        self, original: Callable[..., Any], rows: Tensor, *args: Any, **kwargs: Any
    ) -> bool:
        """timm's pools by name: CLS and the maximum need no sizes."""
        kind = self._pool_type(original, rows, *args, **kwargs)
        return self.attention_pool is not None or kind in ("avg", "avgmax")

    def pooled(
        self, original: Callable[..., Any], rows: Tensor, bias: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        whole = getattr(self.tower, "pool_include_prefix", False)
        mean = original(weigh(rows, bias, 0 if whole else self.encoder.prefix), pool_type="avg")
        if self._pool_type(original, rows, *args, **kwargs) == "avg":
            return mean
        return 0.5 * (original(rows, pool_type="max") + mean)

    def _pool_type(
        self, original: Callable[..., Any], rows: Tensor, *args: Any, **kwargs: Any
    ) -> str:
        given = inspect.signature(original).bind(rows, *args, **kwargs).arguments
        kind: str | None = given.get("pool_type")
        return self.tower.global_pool if kind is None else kind
