"""Tiny image encoders without an LLM, and what each must compute, written down block by block.

A picture at a time: attention with explicit softmax, rows merged in Python loops, from the weights
of the unpatched model. What leaves is decided here as well, in the words of the papers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from kit import skips
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

SIDE, PATCH, CHANNELS, DEPTH, HEADS = 24, 4, 48, 4, 4
ATTENTIONS = ("fused", "plain")


@dataclass(frozen=True)
class BlockParts:
    """One block, in functions of rows (S, C)."""

    heads: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
    """Rows and the patches that they stand for -> queries, keys and values (H, S, D) as used."""
    out: Callable[[Tensor], Tensor]
    """What attention summed up (S, H D) -> what is added."""
    mlp: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Parts:
    prefix: int
    embed: Callable[[Tensor], Tensor]
    """(1, 3, H, W) -> (S, C)"""
    blocks: Sequence[BlockParts]
    finish: Callable[[Tensor, Tensor], Tensor]
    """Rows (S, C) behind the blocks and patches in each (S,) -> what the model returns."""


@dataclass
class Walk:
    """One picture on its way: all rows, those in front of the patches first."""

    rows: Tensor
    sizes: Tensor
    place: Tensor
    """(S,) -1 - n for row n in front, -100 for one that stands for none."""
    merged: list[set[int]] = field(default_factory=list)
    """Patches in each row behind the prefix."""


def walk(parts: Parts, picture: Tensor, name: str, after: dict[int, int], **options: Any) -> Walk:
    """
    Args:
        name: `tome` or `evit`.
        after: rows without prefix behind some blocks.
    """
    rows = parts.embed(picture[None])
    prefix, count = parts.prefix, len(rows) - parts.prefix
    place = torch.cat([-1 - torch.arange(prefix), torch.arange(count)])
    own = Walk(rows, torch.ones(len(rows)), place, [{n} for n in range(count)])
    for number, block in enumerate(parts.blocks):
        query, key, value = block.heads(own.rows, own.place)
        logits = query @ key.mT * key.shape[-1] ** -0.5
        if name == "tome":
            logits = logits + own.sizes.log()
        weights = logits.softmax(-1)
        own.rows = own.rows + block.out((weights @ value).transpose(0, 1).flatten(1))
        if number in after and after[number] < len(own.merged):
            if name == "tome":
                _merge(own, key.mean(0), len(own.merged) - after[number], prefix)
            else:
                received = weights[:, 0] if options["cls"] else weights.mean(1)
                _fuse(own, received.mean(0)[prefix:], after[number], prefix, options["fuse"])
        own.rows = own.rows + block.mlp(own.rows)
    return own


def _merge(own: Walk, keys: Tensor, r: int, prefix: int) -> None:
    """ToMe's bipartite matching over all rows, those in front of the patches left out. Candidates
    that stay come first, then the targets, and the next block parts them in this order."""
    keys = keys.detach()
    unit = keys / keys.norm(dim=-1, keepdim=True)
    one, two = (range(start, len(unit), 2) for start in (0, 1))
    best = {}
    for i in one:
        if i >= prefix:
            found = [(float(unit[i] @ unit[j]), -j) for j in two if j >= prefix]
            best[i] = max(found)
    ranked = sorted(best, key=lambda i: -best[i][0])
    goes, stays = ranked[:r], ranked[r:]
    stays = sorted(stays) if prefix else stays
    total, sizes = own.rows * own.sizes[:, None], own.sizes.clone()
    for i in goes:
        j = -best[i][1]
        total[j] += total[i]
        sizes[j] += sizes[i]
        own.merged[j - prefix] |= own.merged[i - prefix]
    left = [*stays, *(j for j in two if j >= prefix)]
    _keep(own, total / sizes[:, None], sizes, [*range(prefix), *left])
    own.merged = [own.merged[i - prefix] for i in left]


def _fuse(own: Walk, attention: Tensor, keep: int, prefix: int, fuse: bool) -> None:
    """EViT: the rows with the highest attention, and the others' sum weighted by it."""
    attention = attention.detach()  # what is chosen by it, and weighted with it, is given
    order = attention.argsort(descending=True, stable=True).tolist()
    kept = sorted(order[: keep - fuse])
    rest = sorted(order[keep - fuse :])
    merged = [own.merged[n] for n in kept]
    if fuse:
        extra = (attention[rest, None] * own.rows[prefix:][rest]).sum(0, keepdim=True)
        merged.append(set().union(*(own.merged[n] for n in rest)))
    _keep(own, own.rows, own.sizes, [*range(prefix), *(prefix + n for n in kept)])
    own.merged = merged
    if fuse:
        own.rows = torch.cat([own.rows, extra])
        own.sizes = torch.cat([own.sizes, own.sizes.new_ones(1)])
        own.place = torch.cat([own.place, own.place.new_full((1,), -100)])


def _keep(own: Walk, rows: Tensor, sizes: Tensor, left: list[int]) -> None:
    own.rows, own.sizes, own.place = rows[left], sizes[left], own.place[left]


def mean(rows: Tensor, sizes: Tensor) -> Tensor:
    return (rows * sizes[:, None]).sum(0) / sizes.sum()


# --- of transformers -------------------------------------------------------------------------


def split(rows: Tensor, heads: int = HEADS) -> Tensor:
    return rows.unflatten(-1, (heads, -1)).transpose(0, 1)


def _projected(attention: Any, norm: Any) -> Callable[[Tensor, Tensor], Any]:
    def heads(rows: Tensor, place: Tensor) -> tuple[Tensor, ...]:
        normed = norm(rows)
        return tuple(split(getattr(attention, f"{n}_proj")(normed)) for n in "qkv")

    return heads


def clip_parts(model: Any) -> Parts:
    tower = getattr(model, "vision_model", model)
    blocks = [
        BlockParts(
            _projected(layer.self_attn, layer.layer_norm1),
            layer.self_attn.out_proj,
            lambda x, layer=layer: layer.mlp(layer.layer_norm2(x)),
        )
        for layer in tower.encoder.layers
    ]
    clip = hasattr(tower.embeddings, "class_embedding")

    def embed(picture: Tensor) -> Tensor:
        rows = tower.embeddings(picture)
        return (tower.pre_layrnorm(rows) if clip else rows)[0]

    def finish(rows: Tensor, sizes: Tensor) -> Tensor:
        if hasattr(model, "classifier"):
            rows = rows if clip else tower.post_layernorm(rows)
            return model.classifier(mean(rows[clip:], sizes[clip:]))
        if clip:
            found = tower.post_layernorm(rows[0])
            return model.visual_projection(found) if model is not tower else found
        return probed(tower.head, tower.post_layernorm(rows), sizes)

    return Parts(int(clip), embed, blocks, finish)


def probed(head: Any, rows: Tensor, sizes: Tensor) -> Tensor:
    """SigLIP's attention pooling."""
    attention = head.attention
    wide = rows.shape[1]
    weights, biases = attention.in_proj_weight.split(wide), attention.in_proj_bias.split(wide)
    q, k, v = (
        split(torch.nn.functional.linear(x, w, b))
        for x, w, b in zip((head.probe[0], rows, rows), weights, biases, strict=True)
    )
    logits = q @ k.mT * q.shape[-1] ** -0.5 + sizes.log()
    found = attention.out_proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return (found + head.mlp(head.layernorm(found)))[0]


def dinov2_parts(model: Any) -> Parts:
    tower = getattr(model, "dinov2", model)
    blocks = [
        BlockParts(
            _projected(layer.attention, layer.norm1),
            lambda x, layer=layer: layer.layer_scale1(layer.attention.o_proj(x)),
            lambda x, layer=layer: layer.layer_scale2(layer.mlp(layer.norm2(x))),
        )
        for layer in tower.encoder.layer
    ]

    def finish(rows: Tensor, sizes: Tensor) -> Tensor:
        rows = tower.layernorm(rows)
        if model is tower:
            return rows[0]
        return model.classifier(torch.cat([rows[0], mean(rows[1:], sizes[1:])]))

    return Parts(1, lambda picture: tower.embeddings(picture)[0], blocks, finish)


def vit_parts(model: Any) -> Parts:
    tower = getattr(model, "vit", model)
    blocks = [
        BlockParts(
            _projected(layer.attention, layer.layernorm_before),
            layer.attention.o_proj,
            lambda x, layer=layer: layer.mlp(layer.layernorm_after(x)),
        )
        for layer in tower.layers
    ]

    def finish(rows: Tensor, sizes: Tensor) -> Tensor:
        first = tower.layernorm(rows)[0]
        if model is tower:
            return torch.tanh(tower.pooler.dense(first))
        return model.classifier(first)

    return Parts(1, lambda picture: tower.embeddings(picture)[0], blocks, finish)


# --- of timm ---------------------------------------------------------------------------------


def timm_parts(model: Any) -> Parts:
    prefix = model.num_prefix_tokens
    tables: list[Any] = [None] * DEPTH

    def embed(picture: Tensor) -> Tensor:
        rows = model._pos_embed(model.patch_embed(picture))
        if isinstance(rows, tuple):
            rows, rope = rows
            each = getattr(model, "rope_mixed", False)
            tables[:] = [rope[n] if each else rope for n in range(DEPTH)]
        return model.norm_pre(rows)[0]

    def finish(rows: Tensor, sizes: Tensor) -> Tensor:
        return _timm_head(model, model.norm(rows), sizes)

    blocks = [
        BlockParts(
            functools.partial(_timm_heads, block, tables, number, prefix),
            functools.partial(_timm_out, block),
            functools.partial(_timm_mlp, block),
        )
        for number, block in enumerate(model.blocks)
    ]
    return Parts(prefix, embed, blocks, finish)


def _timm_heads(
    block: Any, tables: list[Any], number: int, prefix: int, rows: Tensor, place: Tensor
) -> tuple[Tensor, ...]:
    attention, normed = block.attn, block.norm1(rows)
    if attention.qkv is None:
        q, k, v = (split(getattr(attention, f"{n}_proj")(normed)) for n in "qkv")
    else:
        mixed = attention.qkv(normed)
        if getattr(attention, "q_bias", None) is not None:
            mixed = mixed + torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        q, k, v = mixed.unflatten(-1, (3, HEADS, -1)).permute(1, 2, 0, 3)
    q, k = attention.q_norm(q), attention.k_norm(k)
    if tables[number] is not None:
        sin, cos = tables[number][..., place[prefix:], :].chunk(2, -1)
        half = getattr(attention, "rotate_half", False)
        q, k = (_turned(x, sin, cos, half, prefix) for x in (q, k))
    return q, k, v


def _turned(x: Tensor, sin: Tensor, cos: Tensor, half: bool, prefix: int) -> Tensor:
    front, x = x[:, :prefix], x[:, prefix:]
    if half:
        one, two = x.chunk(2, -1)
        beside = torch.cat([-two, one], -1)
    else:
        beside = torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)
    return torch.cat([front, x * cos + beside * sin], 1)


def _timm_out(block: Any, x: Tensor) -> Tensor:
    found = block.attn.proj(block.attn.norm(x))
    if hasattr(block, "ls1"):
        return block.ls1(found)
    return found if block.gamma_1 is None else block.gamma_1 * found


def _timm_mlp(block: Any, x: Tensor) -> Tensor:
    found = block.mlp(block.norm2(x))
    if hasattr(block, "ls2"):
        return block.ls2(found)
    return found if block.gamma_2 is None else block.gamma_2 * found


def _timm_head(model: Any, rows: Tensor, sizes: Tensor) -> Tensor:
    prefix = model.num_prefix_tokens
    if hasattr(model, "head_dist"):
        return (model.head(rows[0]) + model.head_dist(rows[1])) / 2
    if model.attn_pool is not None:
        whole = type(model).__name__ == "Eva"  # which pools its CLS, too
        rows, sizes = (rows, sizes) if whole else (rows[prefix:], sizes[prefix:])
        return model.head(model.fc_norm(_latent(model.attn_pool, rows, sizes)))
    patches = mean(rows[prefix:], sizes[prefix:])
    pooled = {
        "token": rows[0],
        "avg": patches,
        "avgmax": (patches + rows[prefix:].amax(0)) / 2,
    }[model.global_pool]
    return model.head(model.fc_norm(pooled))


def _latent(head: Any, rows: Tensor, sizes: Tensor) -> Tensor:
    heads = head.num_heads
    q = split(head.q(head.latent[0]), heads)
    k, v = head.kv(rows).unflatten(-1, (2, heads, -1)).permute(1, 2, 0, 3)
    logits = head.q_norm(q) @ head.k_norm(k).mT * q.shape[-1] ** -0.5 + sizes.log()
    found = head.proj((logits.softmax(-1) @ v).transpose(0, 1).flatten(1))
    return (found + head.mlp(head.norm(found)))[0]


# --- the cases -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiny:
    """One class of image encoders, tiny and random."""

    name: str
    make: Callable[[], Any]
    parts: Callable[[Any], Parts]
    timm: bool = False
    cls: bool = True
    rotary: bool = False

    def model(self, attention: str = "fused") -> Any:
        torch.manual_seed(0)
        model = self.make().eval()
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.data = torch.randn_like(weight) * 1.3 / weight[0].numel() ** 0.5
            elif "gamma" in name or "lambda1" in name:
                weight.data = torch.rand_like(weight) + 0.5
        if self.timm:
            for block in model.blocks:
                block.attn.fused_attn = attention == "fused"
        else:
            model.set_attn_implementation("sdpa" if attention == "fused" else "eager")
        return model

    def run(self, model: Any, pixels: Tensor) -> Tensor:
        """What users read of it: logits, or one vector."""
        if self.timm:
            return model(pixels)
        if hasattr(model, "get_image_features"):
            return model.get_image_features(pixel_values=pixels).pooler_output
        output = model(pixel_values=pixels)
        return output.logits if "logits" in output else output.pooler_output


def pixels(count: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def _vision(kind: type, **more: Any) -> Any:
    return kind(
        hidden_size=CHANNELS,
        intermediate_size=2 * CHANNELS,
        num_hidden_layers=DEPTH,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        **more,
    )


def _with_text(kind: type, vision: type) -> Any:
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    config = kind(text_config=text, vision_config=_vision(vision).to_dict())
    config.num_labels = 7
    return config


def _timm(name: str, **options: Any) -> Any:
    import timm

    sizes = {"embed_dim": CHANNELS, "depth": DEPTH, "num_heads": HEADS}
    return timm.create_model(
        name, **sizes, img_size=SIDE, patch_size=PATCH, num_classes=7, **options
    )


def _tiny_timm(label: str, name: str, *, cls: bool = True, rotary: bool = False, **options: Any):
    make = functools.partial(_timm, name, **options)
    return Tiny(f"timm {label}", make, timm_parts, timm=True, cls=cls, rotary=rotary)


_DINOV2 = functools.partial(_vision, Dinov2Config, num_labels=7)
_VIT = functools.partial(_vision, ViTConfig, num_labels=7)
_CLIP = functools.partial(_with_text, CLIPConfig, CLIPVisionConfig)
_SIGLIP = functools.partial(_with_text, SiglipConfig, SiglipVisionConfig)
_ROPE = {"cls": True, "rotary": True}

OURS = (
    Tiny("CLIPVisionModel", lambda: CLIPVisionModel(_vision(CLIPVisionConfig)), clip_parts),
    Tiny("CLIPModel", lambda: CLIPModel(_CLIP()), clip_parts),
    Tiny("CLIP classifier", lambda: CLIPForImageClassification(_CLIP()), clip_parts),
    Tiny(
        "SiglipVisionModel",
        lambda: SiglipVisionModel(_vision(SiglipVisionConfig)),
        clip_parts,
        cls=False,
    ),
    Tiny(
        "Siglip classifier",
        lambda: SiglipForImageClassification(_SIGLIP()),
        clip_parts,
        cls=False,
    ),
    Tiny("Dinov2Model", lambda: Dinov2Model(_DINOV2()), dinov2_parts),
    Tiny("Dinov2 classifier", lambda: Dinov2ForImageClassification(_DINOV2()), dinov2_parts),
    Tiny("ViTModel", lambda: ViTModel(_VIT()), vit_parts),
    Tiny("ViT classifier", lambda: ViTForImageClassification(_VIT()), vit_parts),
)
TIMM = (
    _tiny_timm("vit", "vit_tiny_patch16_224"),
    _tiny_timm("deit distilled", "deit_tiny_distilled_patch16_224"),
    _tiny_timm("registers", "vit_small_patch14_reg4_dinov2"),
    _tiny_timm("layer scale", "vit_small_patch14_dinov2"),
    _tiny_timm("q k norm", "vit_tiny_patch16_224", qk_norm=True),
    _tiny_timm("mean", "vit_tiny_patch16_224", global_pool="avg"),
    _tiny_timm("mean and most", "vit_tiny_patch16_224", global_pool="avgmax"),
    _tiny_timm("no cls", "vit_tiny_patch16_224", global_pool="avg", class_token=False, cls=False),
    _tiny_timm("siglip", "vit_base_patch16_siglip_224", cls=False),
    _tiny_timm("eva02", "eva02_tiny_patch14_224", **_ROPE, ref_feat_shape=(6, 6)),
    _tiny_timm("perception", "vit_pe_core_tiny_patch16_384", **_ROPE, ref_feat_shape=(6, 6)),
    _tiny_timm("dinov3", "vit_small_patch16_dinov3", **_ROPE),
    _tiny_timm("mixed rope", "vit_small_patch16_rope_mixed_224", **_ROPE),
)
EVERY = [
    *(pytest.param(tiny, id=tiny.name) for tiny in OURS),
    *(pytest.param(tiny, id=tiny.name, marks=skips.needs("timm")) for tiny in TIMM),
]
