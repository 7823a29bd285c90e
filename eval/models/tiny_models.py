"""Tiny random-weight models and inputs for them as tensors, offline.

The weights are drawn so that attention is peaky and every token matters: with the usual 0.02
initialisation all tokens look alike and a wrong position or mask would not show.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from ...adapters.sequence.masks import STATES
from ...prune.contract import Decoder, ModelShape, Tower
from ...prune.tiling import Tiling
from .pressed import Pressed
from .tiny_layouts import (
    DECODER,
    FIRST_WORD,
    IMAGE,
    LAST_WORD,
    PAD,
    PLAIN,
    SINGLE,
    VIDEO,
    VISION_END,
    VISION_START,
    Plain,
    Row,
    placed,
)


@dataclass(frozen=True)
class Case:
    """One model layout: how to build it, what a method may know of it, and inputs for it."""

    name: str
    config: Callable[[], PreTrainedConfig]
    shape: ModelShape
    layout: Plain = PLAIN
    fixed_positions: bool = False
    """Whether the rotary positions are two-dimensional, so that only `original` is allowed."""
    checked: bool = False
    """Whether `check-method` checks methods on it: one for each thing that it may ask of them
    (encoders with and without CLS token, tiles, windows, positions of several axes), so that a
    check stays short however many families there are."""

    @property
    def whole_cache(self) -> bool:
        """Whether every decoder layer with attention stores the whole prompt, as methods on the
        cache need."""
        return _stores_all(self)

    @property
    def packed(self) -> bool:
        """Whether patches of all images come in one row."""
        return self.layout.packed

    def model(self, attn_implementation: str = "sdpa") -> PreTrainedModel:
        """A new model with the same weights every time."""
        model: PreTrainedModel = _build(self, attn_implementation)[1].made()
        return model

    def reference(self, attn_implementation: str = "sdpa") -> PreTrainedModel:
        """The shared model that nobody patches."""
        return _build(self, attn_implementation)[0]

    def tiling(self, image: str, alone: bool = True) -> Tiling:
        """How the tokens of an image lie, in a prompt where it is the only one or is not."""
        return self.layout.tiling(image, alone)

    def tilings(self, rows: Sequence[Row]) -> list[Tiling]:
        """Those of all images of a batch, in batch order."""
        return [self.tiling(name, alone) for name, alone in placed(rows)]

    def num_tokens(self, image: str, alone: bool = True) -> int:
        """N of an image, newlines included."""
        return self.tiling(image, alone).num_tokens

    def counts(self, rows: Sequence[Row]) -> list[int]:
        """N of all images of a batch, in batch order."""
        return [tiling.num_tokens for tiling in self.tilings(rows)]

    def grid(self, image: str) -> tuple[int, int]:
        """Rows and columns of visual tokens of an image that is one rectangle."""
        (tile,) = self.tiling(image).tiles
        return tile.rows, tile.columns

    def row_ids(self, row: Row) -> torch.Tensor:
        """Token ids of one prompt (L,), without padding."""
        words = torch.Generator().manual_seed(zlib.crc32(repr(row).encode()))
        counts = iter(self.counts([row]))
        ids: list[int] = []
        for part in row:
            if isinstance(part, int):
                ids += torch.randint(FIRST_WORD, LAST_WORD, (part,), generator=words).tolist()
            else:
                token = self.layout.placeholder(part)
                ids += self.layout.framed(part, [token] * next(counts))
        return torch.tensor(ids)

    def inputs(self, rows: Sequence[Row] = SINGLE, padding: str = "left") -> dict[str, Any]:
        """What a processor would give for these prompts, for `model(**x)` and `generate(**x)`."""
        ids = [self.row_ids(row) for row in rows]
        length = max(len(x) for x in ids)
        input_ids = torch.full((len(ids), length), PAD)
        mask = torch.zeros(len(ids), length, dtype=torch.long)
        for b, x in enumerate(ids):
            at = slice(length - len(x), None) if padding == "left" else slice(0, len(x))
            input_ids[b, at], mask[b, at] = x, 1
        inputs = {"input_ids": input_ids, "attention_mask": mask}
        return inputs | self.layout.extra(rows, input_ids)


@functools.cache
def _stores_all(case: Case) -> bool:
    kinds = getattr(case.config().get_text_config(), "layer_types", None) or ()
    return set(kinds) <= {"full_attention", *STATES}


@functools.cache
def _build(case: Case, attn_implementation: str) -> tuple[PreTrainedModel, Pressed]:
    """The shared model, and what it is before it runs."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    model = AutoModelForImageTextToText.from_config(case.config()).eval()
    model.set_attn_implementation(attn_implementation)
    # Drawn under one seed whatever the attention, so that implementations can be compared.
    draw = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=draw)
        owner = model.get_submodule(name.rpartition(".")[0])
        scale = getattr(owner, "scalar_embed_scale", 1.0)  # Gemma's, of embeddings
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            attention: Any = model.get_submodule(name.rsplit(".", 2)[0])
            if attention.scaling == 1:  # Gemma 4's norms have learnt to scale
                scale = attention.head_dim**0.25
        weight.data = _weight(name, weight, noise) / scale
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    model.requires_grad_(False)
    return model, Pressed(model)


def _weight(name: str, begun: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """
    Args:
        begun: what the model was built with.
    """
    shape = noise.shape
    if "norm" in name or "ln_" in name:
        return begun + 0.1 * noise  # of some models a weight is what is added to one
    if "image_newline" in name:
        return noise
    if len(shape) == 1:
        return 0.3 * noise
    if "embed_tokens" in name or "embeddings_table" in name:
        return noise
    if "position_embedding" in name:
        return 0.7 * noise
    gain = 1.0
    if any(part in name for part in ("q_proj", "k_proj", "attn.qkv")):
        gain = 1.7  # sharp attention
    if "lm_head" in name:
        gain = 3.0  # clear winners
        noise[[IMAGE, VIDEO, VISION_START, VISION_END]] = 0
    fan_in = shape[-1] if "experts" in name else shape[1:].numel()
    return gain * noise / fan_in**0.5


def tiny_shape(**tower: Any) -> ModelShape:
    """Of a tiny model; `tower`: what is so of its encoder."""
    sizes = {k: DECODER[k] for k in ("hidden_size", "intermediate_size")}
    return ModelShape(
        tower=Tower(num_layers=5, **tower),
        decoder=Decoder(num_layers=DECODER["num_hidden_layers"], **sizes),
    )
