"""`vlmprune bench model`: dense, oracle and patched prefill of one model, side by side.

The oracle is the unpatched language model on hidden states that already have the kept number of
visual tokens (per stretch of layers, for a method that cuts in the decoder), with the full vision
encoder before it: the time if choosing and bookkeeping cost nothing. Oracle time / patched time is
how close the code is to its limit. Weights are random, which changes no time.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from ..adapters.family import IMAGE
from ..adapters.patching import Handle, patch
from ..adapters.registry import family_of
from ..prune.budget import Budget, MethodCall
from ..prune.errors import MethodFieldError
from .console import progress, stdout
from .environment import describe, hardware, versions
from .flops import ModelCost, model_cost, visual_share
from .loading import resolve_device
from .measure import module_seconds, synchronise
from .results import ResultsError, call_text, method_record
from .stats import Spread, spread
from .sweep import grid
from .sweep_command import parse_method
from .table import Table

SCHEMA = 1
_TEXT_TOKENS = 40
_IMAGE_TOKEN = 5
_PATCH = 14


def run(
    *,
    methods: Sequence[str],
    budgets: Sequence[str],
    layers: int,
    width: int,
    tokens: int,
    repeats: int,
    device: str | None,
    dtype: str,
    attn_implementation: str,
    output_path: str | None,
) -> int:
    """The command; arguments are the flags of `vlmprune bench`. Returns the exit code."""
    side = math.isqrt(tokens)
    if side * side != tokens or width % 64:
        raise MethodFieldError(
            f"--tokens {tokens} must be a square (e.g. 576) and --width {width} a multiple of 64."
        )
    calls = grid(
        [parse_method(text, 0) for text in methods if text != "dense"],
        [Budget.parse(text) for text in budgets],
    )
    device = resolve_device(device)
    model = mid_size_llava(layers=layers, width=width, side=side)
    model.set_attn_implementation(attn_implementation)
    model = model.to(device, getattr(torch, dtype))
    inputs = _inputs(model, tokens, side)
    variants = [Variant(call) for call in calls]
    with progress() as bar:
        rounds = bar.add_task("bench", total=(repeats + 1) * len(variants))
        compare(model, inputs, variants, repeats, lambda: bar.advance(rounds))

    shape = {"layers": layers, "width": width, "visual_tokens": tokens, "text_tokens": _TEXT_TOKENS}
    report = {
        "schema": SCHEMA,
        "model": shape | {"dtype": dtype, "attn_implementation": attn_implementation},
        "rounds": repeats,
        "hardware": hardware(device),
        "versions": versions(),
        "variants": [v.as_json(model_cost(model)) for v in variants],
    }
    bench_table(report).print(stdout())
    if output_path:
        try:
            Path(output_path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise ResultsError(f"{output_path!r} cannot be written: {error.strerror}.") from error
    return 0


# --- Measuring -------------------------------------------------------------------------------


@dataclass
class Variant:
    """The dense model (`call` None) or a method, with what was measured of it and its oracle."""

    call: MethodCall | None
    total: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    select: list[float] = field(default_factory=list)
    oracle: list[float] = field(default_factory=list)
    oracle_vision: list[float] = field(default_factory=list)
    vs_dense: list[float] = field(default_factory=list)
    per_layer: list[int] = field(default_factory=list)
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of the image's tokens."""

    @property
    def name(self) -> str:
        return call_text(self.call) if self.call else "dense"

    def as_json(self, cost: ModelCost) -> dict[str, Any]:
        vision = [*self.vision, *self.oracle_vision]
        flops = cost.sample(
            pictures=[self.grid], visual_per_layer=self.per_layer, text_tokens=_TEXT_TOKENS
        )
        rest = [t - v - s for t, v, s in zip(self.total, self.vision, self.select, strict=True)]
        oracle_rest = [t - v for t, v in zip(self.oracle, self.oracle_vision, strict=True)]
        return {
            "name": self.name,
            "method": method_record(self.call) if self.call else None,
            "kept": self.per_layer[-1],
            "average_per_layer": sum(self.per_layer) / len(self.per_layer),
            "first_token_flops": flops.first_token,
            "visual_share": visual_share(self.per_layer, self.grid[0] * self.grid[1], cost.decoder),
            "seconds": {
                "total": spread(self.total),
                "vision": spread(vision),
                "select": spread(self.select),
                "prefill": spread(rest),
                "oracle_total": spread(self.oracle),
                "oracle_prefill": spread(oracle_rest),
            },
            "speed_up": spread(self.vs_dense),
            "oracle_over_patched": spread(
                [o / t for o, t in zip(self.oracle, self.total, strict=True)] if self.oracle else []
            ),
            "oracle_over_patched_prefill": spread(
                [o / (r + s) for o, r, s in zip(oracle_rest, rest, self.select, strict=True)]
                if self.oracle
                else []
            ),
        }


@torch.inference_mode()
def compare(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    variants: Sequence[Variant],
    repeats: int,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """Fill the variants, the first of which is dense: every round runs all of them, in turn.

    One more round, the first, warms up and is thrown away.
    """
    family = family_of(model)
    tower = family.vision_tower(model)
    (grid,) = family.pictures(model, IMAGE, inputs)[0]
    device = next(model.parameters()).device
    tokens = int((inputs["input_ids"] == _IMAGE_TOKEN).sum())
    layers = family.shape(model).decoder.num_layers

    def clock(call: Callable[[], object]) -> tuple[float, float]:
        with module_seconds(tower, device) as vision:
            synchronise(device)
            start = time.perf_counter()
            call()
            synchronise(device)
            return time.perf_counter() - start, sum(vision)

    def prefill() -> object:
        return model(**inputs, use_cache=True, logits_to_keep=1)

    for number in range(repeats + 1):
        dense = 0.0
        for variant in variants:
            variant.grid = grid
            select = oracle = oracle_vision = 0.0
            if variant.call is None:
                total, vision = clock(prefill)
                dense = total
                variant.per_layer = [tokens] * layers
            else:
                with patch(model, variant.call) as handle:
                    total, vision = clock(prefill)
                    select = handle.last.select_seconds
                    cuts = _cuts(handle)
                    variant.per_layer = handle.last.tokens_per_layer[0]
                oracle, oracle_vision = clock(partial(oracle_prefill, model, inputs, cuts))
            advance()
            if number == 0:
                continue
            variant.total.append(total)
            variant.vision.append(vision)
            variant.select.append(select)
            variant.vs_dense.append(dense / total)
            if variant.call is not None:
                variant.oracle.append(oracle)
                variant.oracle_vision.append(oracle_vision)


def oracle_prefill(
    model: PreTrainedModel, inputs: dict[str, Tensor], cuts: Sequence[tuple[int, Tensor]]
) -> Tensor:
    """Prefill with as many tokens as were kept, known beforehand: the time is that of the kept
    ones, the logits are not (inside the decoder the final norm even runs once more).

    Args:
        cuts: (first layer that sees fewer tokens, numbers of visual tokens that are left).
    """
    family = family_of(model)
    core: Any = family.core(model)
    text_model: Any = family.text_model(model)
    ids = inputs["input_ids"]
    features = core.get_image_features(inputs["pixel_values"]).pooler_output[0]
    hidden = model.get_input_embeddings()(ids)
    visual = ids[0] == _IMAGE_TOKEN
    hidden[0, visual] = features.to(hidden.dtype)
    alive = torch.arange(ids.shape[1], device=ids.device)
    first_visual = int(visual.nonzero()[0])
    layers = text_model.layers
    starts = [0, *[layer for layer, _ in cuts if layer], len(layers)]
    index_at = dict(cuts)
    try:
        for start, stop in pairwise(starts):
            if start in index_at:
                keep = ~visual
                keep[index_at[start].to(ids.device) + first_visual] = True
                hidden = hidden[:, keep[alive]]
                alive = alive[keep[alive]]
            text_model.layers = layers[start:stop]
            hidden = text_model(inputs_embeds=hidden, use_cache=True).last_hidden_state
    finally:
        text_model.layers = layers
    return model.get_output_embeddings()(hidden[:, -1:])


def _cuts(handle: Handle) -> list[tuple[int, Tensor]]:
    """Counts decide: rows of merged tokens have no number of their own."""
    return [(stage.layer, torch.arange(stage.keep)) for stage in handle.last.plans[0]]


# --- The model -------------------------------------------------------------------------------


def mid_size_llava(*, layers: int, width: int, side: int) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights: `side` x `side` visual tokens, CLIP tower of half the width."""
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=32000,
        hidden_size=width,
        intermediate_size=round(width * 2.6875),  # 11008 / 4096
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        num_key_value_heads=max(1, width // 128),
        max_position_embeddings=4096,
    )
    vision = CLIPVisionConfig(
        hidden_size=width // 2,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 128),
        image_size=side * _PATCH,
        patch_size=_PATCH,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=_IMAGE_TOKEN)
    return LlavaForConditionalGeneration(config).eval()


def _inputs(model: PreTrainedModel, tokens: int, side: int) -> dict[str, Tensor]:
    """One picture between text tokens."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(10, 30000, (_TEXT_TOKENS,), generator=generator)
    image = torch.full((tokens,), _IMAGE_TOKEN)
    ids = torch.cat([text[:5], image, text[5:]])[None]
    pixels = torch.randn(1, 3, side * _PATCH, side * _PATCH, generator=generator)
    return {
        "input_ids": ids.to(parameter.device),
        "pixel_values": pixels.to(parameter.device, parameter.dtype),
    }


# --- The table -------------------------------------------------------------------------------


def bench_table(report: dict[str, Any]) -> Table:
    """The report of one run, as written to the result file."""
    model = report["model"]
    rows: list[tuple[str, ...]] = []
    for variant in report["variants"]:
        seconds = variant["seconds"]
        rows.append(
            (
                variant["name"],
                f"{variant['average_per_layer']:.1f}",
                f"{variant['first_token_flops'] / 1e9:.4g}",
                _ms(seconds["vision"]),
                _ms(seconds["select"]) if variant["method"] else "",
                _ms(seconds["prefill"]),
                _ms_range(seconds["total"]),
                f"{variant['speed_up']['median']:.2f}x",
                _ms_range(seconds["oracle_total"]),
                _percent(variant["oracle_over_patched"]),
                _percent(variant["oracle_over_patched_prefill"]),
            )
        )
    return Table(
        headers=(
            "Variant",
            "Avg/layer",
            "GFLOPs",
            "Vision ms",
            "Choice ms",
            "Prefill ms",
            "Total ms [quartiles]",
            "Speed-up",
            "Oracle total ms",
            "Oracle/patched %",
            "in the LLM %",
        ),
        rows=rows,
        numbers_from=1,
        droppable=(2, 1, 3, 4),
        title=(
            f"LLaVA, random weights: {model['layers']} layers, width {model['width']}, "
            f"{model['visual_tokens']} visual + {model['text_tokens']} text tokens, "
            f"{model['dtype']}, {model['attn_implementation']}; {report['rounds']} rounds on "
            f"{describe(report['hardware'])}"
        ),
        notes=(
            "Medians over rounds; ratios are taken within a round. Total: one forward up to the "
            "first token's logits. Oracle: the unpatched language model on the kept tokens, after "
            "the full vision encoder. Choice: without reading scores, a part of vision or prefill."
        ),
    )


def _ms(value: Spread | None) -> str:
    return f"{1e3 * value['median']:.1f}" if value else ""


def _ms_range(value: Spread | None) -> str:
    if not value:
        return ""
    return f"{1e3 * value['median']:.0f} [{1e3 * value['q1']:.0f}, {1e3 * value['q3']:.0f}]"


def _percent(value: Spread | None) -> str:
    return f"{100 * value['median']:.1f}" if value else ""
