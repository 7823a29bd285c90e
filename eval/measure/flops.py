"""What a forward pass costs, computed from sizes alone.

Counted: matrix products of linear and convolution layers and of attention (`q k^T` and `p v`, the
full rectangle of queries and keys, as fused kernels are usually reported), a multiply-add being 2
operations. Not counted: norms, activations, softmax, rotary embeddings, embedding look-ups,
positions that are brought to the size of a picture, means of patches, padding, and the choice of
tokens (its time is measured instead).

`visual_flops` is the other convention, the literature's: multiply-adds, decoder only, visual tokens
only. It is what published TFLOPs and our frontiers are in.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from ...adapters.family import Family
from ...adapters.registry import family_of
from ...prune.budget import MethodCall, entries_kept, layer_flops
from ...prune.contract import Decoder, Place, Thinned
from .shortened import Grid, Shortened

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NOTHING: Mapping[int, Thinned] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Block:
    """A transformer block: FLOPs of its attention and of its MLP per token, and per pair of a query
    and a key."""

    attention: int
    mlp: int
    per_pair: int

    @property
    def per_token(self) -> int:
        return self.attention + self.mlp

    def flops(self, queries: int, keys: int) -> int:
        return self.per_token * queries + self.per_pair * queries * keys


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionCost:
    """The vision encoder and everything between it and the decoder.

    `window` is the side of an attention window in visual tokens, for the blocks that are not in
    `full_attention`; 0 where every block sees the whole image. `projectors` has the FLOPs per token
    of each, and the block that it reads behind.
    """

    blocks: tuple[Block, ...]
    per_patch: int
    projectors: tuple[tuple[int, int], ...]
    has_cls: bool
    merge_unit: int
    window: int = 0
    full_attention: tuple[int, ...] | None = None
    head_per_token: int = 0
    head_fixed: int = 0

    def encoder(
        self, grid: Grid, unread_layers: int = 0, shortened: Shortened | None = None
    ) -> int:
        """FLOPs of the encoder for a picture of `grid` rows by columns of future tokens, without
        its last `unread_layers`, which a patched model does not run.

        Args:
            shortened: where rows leave in it. Which of them is not known: windows count as if those
                that are left filled the largest ones up, the most that it can be.
        """
        whole, windows = grid[0] * grid[1], _windows(grid, self.window)
        total = self.per_patch * whole * self.merge_unit
        for index, block in enumerate(self.blocks[: len(self.blocks) - unread_layers]):
            at = (whole, whole) if shortened is None else shortened.at(index, whole)
            queries, through_mlp = (rows * self.merge_unit + self.has_cls for rows in at)
            full = self.full_attention is None or index in self.full_attention
            spans = [queries] if full else [n * self.merge_unit for n in _filled(windows, at[0])]
            total += block.attention * queries + block.mlp * through_mlp
            total += block.per_pair * sum(n * n for n in spans)
        last = self._behind(len(self.blocks) - unread_layers - 1, whole, unread_layers, shortened)
        return (
            total + self.head_fixed + self.head_per_token * (last * self.merge_unit + self.has_cls)
        )

    def projector(
        self, grid: Grid, unread_layers: int = 0, shortened: Shortened | None = None
    ) -> int:
        """FLOPs of the projector or mergers for one picture."""
        whole = grid[0] * grid[1]
        return sum(
            per_token * self._behind(block, whole, unread_layers, shortened)
            for per_token, block in self.projectors
        )

    def _behind(
        self, block: int, whole: int, unread_layers: int, shortened: Shortened | None
    ) -> int:
        """Rows behind a block, or behind the last that is read."""
        if shortened is None:
            return whole
        read = len(self.blocks) - unread_layers - 1
        return shortened.behind(min(block, read), whole, last=block >= read)


@dataclass(frozen=True, slots=True, kw_only=True)
class Flops:
    """FLOPs of one sample, by part. `decode` covers all new tokens after the first."""

    vision: int
    projector: int
    prefill: int
    lm_head: int
    decode: int = 0

    @property
    def first_token(self) -> int:
        """Everything up to the first new token."""
        return self.vision + self.projector + self.prefill + self.lm_head


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """A model as its FLOPs see it; made by `model_cost`."""

    vision: VisionCost
    layers: tuple[Block, ...]
    lm_head: int
    decoder: Decoder
    entering: int = 0
    """Per token, in front of the decoder's layers."""
    key_heads: int = 1
    """Of each layer with attention."""
    reading: int = 0
    """Last layers that store nothing, which only tokens pass whose logits are wanted."""

    def prefill(
        self,
        tokens_per_layer: Sequence[int],
        logits: int | None = None,
        thinned: Mapping[int, Thinned] = NOTHING,
    ) -> int:
        """The decoder's layers, from the tokens (visual and text) that enter each of them.

        Args:
            logits: of how many of them logits are wanted; None: of all.
            thinned: by layer, what a method leaves out of it: heads count, values do not, which
                all are multiplied in a prompt.
        """
        total, storing = self.entering * tokens_per_layer[0], len(self.layers) - self.reading
        for number, (layer, n) in enumerate(zip(self.layers, tokens_per_layer, strict=True)):
            passing = n if logits is None or number < storing else min(n, logits)
            if (one := thinned.get(number)) is not None:
                alive = one.heads_of(self.key_heads)
                layer = replace(layer, per_pair=layer.per_pair * alive // self.key_heads)
            total += layer.flops(passing, n)
        return total

    def decode(
        self,
        tokens_per_layer: Sequence[int],
        new_tokens: int,
        thinned: Mapping[int, Thinned] = NOTHING,
    ) -> int:
        """The steps after the first new token: layers over a growing cache, and the head.

        Args:
            tokens_per_layer: entries of the cache that each layer attends to at first.
            thinned: by layer, what a method leaves out of it: values and neurons count, heads do
                not, which all are computed in a step.
        """
        layers = [
            replace(
                layer,
                mlp=round(layer.mlp * one.neurons),
                per_pair=round(layer.per_pair * (1 + one.values) / 2),
            )
            if (one := thinned.get(number)) is not None
            else layer
            for number, layer in enumerate(self.layers)
        ]
        total = 0
        for step in range(1, new_tokens):
            total += (
                self.entering
                + self.lm_head
                + sum(
                    layer.flops(1, n + step)
                    for layer, n in zip(layers, tokens_per_layer, strict=True)
                )
            )
        return total

    def sample(
        self,
        *,
        pictures: Sequence[Grid],
        visual_per_layer: Sequence[int],
        text_tokens: int,
        new_tokens: int = 1,
        logits: int = 1,
        cache_entries: int | None = None,
        unread_layers: int = 0,
        shortened: Sequence[Shortened | None] | None = None,
        thinned: Mapping[int, Thinned] = NOTHING,
    ) -> Flops:
        """FLOPs of one sample.

        Args:
            pictures: rows and columns of every picture that the encoder saw (`Family.pictures`).
            visual_per_layer: visual tokens that entered each decoder layer.
            text_tokens: real text tokens of the prompt, pads not counted.
            new_tokens: tokens generated.
            logits: positions whose logits are computed in prefill (`generate` computes one).
            cache_entries: the most entries of the prompt that a new token attends to in a layer,
                where a method on the cache limits them.
            unread_layers: last encoder layers that a patched model does not run, because neither
                the projector nor its methods read them.
            shortened: how rows of each picture leave in the encoder; None: they do not.
            thinned: by layer, what a method leaves out of it beside tokens.
        """
        seen = list(zip(pictures, shortened or [None] * len(pictures), strict=True))
        entering = [n + text_tokens for n in visual_per_layer]
        attended = [n if cache_entries is None else min(n, cache_entries) for n in entering]
        return Flops(
            vision=sum(self.vision.encoder(grid, unread_layers, own) for grid, own in seen),
            projector=sum(self.vision.projector(grid, unread_layers, own) for grid, own in seen),
            prefill=self.prefill(entering, logits, thinned),
            lm_head=self.lm_head * logits,
            decode=self.decode(attended, new_tokens, thinned),
        )


def after_cuts(per_layer: Sequence[float]) -> list[float]:
    """Visual tokens left behind each layer, after a cut between it and the next: what SparseVLM's
    averages are taken over.

    Args:
        per_layer: visual tokens that entered each layer.
    """
    return [*per_layer[1:], per_layer[-1]]


def cache_entries(calls: Sequence[MethodCall], visual: Sequence[int], text: int) -> int | None:
    """Entries of a prompt that methods on the cache leave in reach of a new token (None: all, also
    for those without a budget). What they remove or add later, while decoding, is not counted.

    Args:
        visual: tokens of each of the prompt's images.
        text: the prompt's other tokens.
    """
    limits = [
        entries_kept(call, visual, text) for call in calls if call.method.place is Place.CACHE
    ]
    return min((limit for limit in limits if limit is not None), default=None)


def visual_flops(visual_per_layer: Sequence[int], decoder: Decoder) -> int:
    """The literature's figure: multiply-adds of the decoder over visual tokens only."""
    return sum(layer_flops(n, decoder) for n in visual_per_layer)


def visual_share(visual_per_layer: Sequence[int], dense: int, decoder: Decoder) -> float:
    """`visual_flops` relative to the model that sees all `dense` tokens in every layer."""
    if not dense:
        return 1.0
    return visual_flops(visual_per_layer, decoder) / (
        len(visual_per_layer) * layer_flops(dense, decoder)
    )


def model_cost(model: PreTrainedModel) -> ModelCost:
    """Read a loaded model's sizes off its modules; any family that vlmprune knows."""
    family = family_of(model)
    text_model: Any = family.text_model
    heads = text_model.config.num_attention_heads
    shape = family.shape
    attending = set(shape.decoder.attending)
    return ModelCost(
        vision=_vision_cost(family),
        layers=tuple(
            Block(
                attention=_mixing(layer),
                mlp=_matmuls(layer) - _matmuls(_mixer(layer)),
                per_pair=4 * heads * _mixer(layer).head_dim if number in attending else 0,
            )
            for number, layer in enumerate(text_model.layers)
        ),
        lm_head=_matmuls(model.get_output_embeddings()),
        decoder=shape.decoder,
        key_heads=_key_heads(_mixer(text_model.layers[shape.decoder.attending[0]])),
        entering=sum(map(_own, _outside(text_model, [text_model.layers]))),
        # Releases of transformers before 5.23 let all tokens pass all layers.
        reading=(getattr(text_model.config, "num_kv_shared_layers", None) or 0)
        * hasattr(text_model, "_maybe_slice_kv_shared_inputs"),
    )


def _vision_cost(family: Family) -> VisionCost:
    tower, shape = family.vision_tower, family.shape
    config = tower.config
    width = getattr(config, "embed_dim", None) or config.hidden_size
    stack = max((m for m in tower.modules() if isinstance(m, nn.ModuleList)), key=len)
    head = getattr(tower, "head", None)  # SigLIP's attention pooling, run although nobody reads it
    others = [view.vision_tower for view in family.views if view is not family]
    elsewhere = [m for m in (stack, head, family.text_model, *others) if m is not None]
    between = list(_outside(family.core, elsewhere))
    # Where features are taken between the blocks, each merger has a block of its own.
    behind = [len(stack) - 1, *getattr(tower, "deepstack_visual_indexes", ())]
    behind += behind[:1] * (len(family.projectors) - len(behind))
    attention = list(map(_matmuls, family.vision_attention))
    # One that reads rows of the blocks merges those of a token.
    convolutions = [m for m in between if isinstance(m, nn.Conv2d | nn.Conv3d)]
    merging = [m for m in convolutions if m.in_channels == width]
    side = getattr(config, "window_size", None)
    return VisionCost(
        blocks=tuple(
            Block(attention=own, mlp=_matmuls(block) - own, per_pair=4 * width)
            for block, own in zip(stack, attention, strict=True)
        ),
        per_patch=sum(_weights(m) for m in convolutions if m not in merging) + _embedding(tower),
        projectors=tuple(
            (
                _matmuls(module) + _bare(module) + (sum(map(_weights, merging)) if not n else 0),
                block,
            )
            for n, (module, block) in enumerate(zip(family.projectors, behind, strict=True))
        ),
        has_cls=shape.tower.has_cls,
        merge_unit=shape.tower.merge_unit,
        window=side // config.spatial_merge_size // config.patch_size if side else 0,
        full_attention=shape.tower.full_attention,
        # keys and values of every patch, and one query: projections, scores, then the MLP
        head_per_token=2 * 2 * width * width + 4 * width if head is not None else 0,
        head_fixed=2 * 2 * width * width + _matmuls(head.mlp) if head is not None else 0,
    )


def _embedding(tower: Any) -> int:
    """FLOPs per patch of an encoder that is given patches, not pictures, and embeds them without a
    convolution."""
    for names in (("embeddings", "patch_embedding"), ("patch_embedder", "input_proj")):
        linear: Any = functools.reduce(lambda at, name: getattr(at, name, None), names, tower)
        if isinstance(linear, nn.Linear):
            return _weights(linear)
    return 0


def _bare(module: nn.Module) -> int:
    """FLOPs per token of matrices that a module holds outside of linear layers."""
    held = module.parameters(recurse=False)
    return sum(2 * w.numel() for w in held if w.dim() == 2) * (not isinstance(module, nn.Linear))


def _own(module: nn.Module) -> int:
    return _weights(module) if isinstance(module, nn.Linear) else 0


def _windows(grid: tuple[int, int], side: int) -> list[int]:
    """Sizes of the windows that tile `grid`, smaller at the right and lower edges."""
    if not side:
        return [grid[0] * grid[1]]
    rows, columns = ([min(side, n - start) for start in range(0, n, side)] for n in grid)
    return [height * width for height in rows for width in columns]


def _filled(windows: Sequence[int], rows: int) -> list[int]:
    """Rows in each window where those of the largest have all stayed, and of others as many as are
    left: no other way to leave as many has as many pairs of rows."""
    found = []
    for size in sorted(windows, reverse=True):
        found.append(min(size, rows))
        rows -= found[-1]
    return found


def _outside(root: nn.Module, excluded: Sequence[nn.Module]) -> Iterator[nn.Module]:
    """All modules below `root`, without the excluded ones and what is in them."""
    if any(root is module for module in excluded):
        return
    yield root
    for child in root.children():
        yield from _outside(child, excluded)


def _mixer(layer: Any) -> nn.Module:
    """What mixes tokens in a decoder layer."""
    names = ("self_attn", "linear_attn", "conv")
    found: nn.Module = next(getattr(layer, name) for name in names if hasattr(layer, name))
    return found


def _key_heads(attention: Any) -> int:
    """Of the first layer with attention; those of others are as many where heads may leave."""
    count: int = attention.k_proj.weight.shape[0] // attention.head_dim
    return count


def _mixing(layer: Any) -> int:
    """FLOPs per token of it: projections, and of layers that keep a state also the convolution and
    the recurrence of gated delta rules, which reads, corrects and asks the state of each head."""
    mixer: Any = _mixer(layer)
    found = _matmuls(mixer) + sum(_weights(m) for m in mixer.modules() if type(m) is nn.Conv1d)
    if hasattr(mixer, "head_k_dim"):
        found += 6 * mixer.num_v_heads * mixer.head_k_dim * mixer.head_v_dim
    return found


def _weights(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> int:
    return 2 * module.weight.numel()


def _matmuls(module: nn.Module) -> int:
    """FLOPs per token of all linear layers below `module`, of experts the active ones' and those
    of the choice of them."""
    found = sum(_weights(m) for m in module.modules() if isinstance(m, nn.Linear))
    for block in module.modules():
        experts: Any = getattr(block, "experts", None)
        if experts is not None:
            weights = 2 * sum(w.numel() for w in experts.parameters() if w.dim() == 3)
            if (router := getattr(block, "gate", None)) is not None:
                found += weights // router.num_experts * router.top_k + 2 * router.weight.numel()
            else:  # Gemma 4's chooses by a linear layer
                config: Any = block.router.config  # type: ignore[union-attr]
                found += weights // config.num_experts * config.top_k_experts
    return found
