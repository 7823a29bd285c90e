"""`vlmprune bench model`: dense, oracle and patched prefill of one model, side by side, and the
tokens decoded after it.

The oracle is the unpatched language model on hidden states that already have the kept number of
visual tokens (per stretch of layers, for a method that cuts in the decoder), with the full vision
encoder before it: the time if choosing and bookkeeping cost nothing. Oracle time / patched time is
how close the code is to its limit. A method on the KV cache removes nothing from the prefill: its
oracle is the dense model's. Weights are random, which changes no time (but what an adaptive rule
finds).
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
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
from ..prune.errors import MethodFieldError
from .compose import Parts, grid, parse, parse_budgets
from .console import progress, stdout
from .environment import describe, hardware, versions
from .flops import ModelCost, after_cuts, model_cost, visual_share
from .loading import resolve_device
from .measure import kv_bytes, module_seconds, synchronise
from .memory import MemoryMeasureError, added_at_peak, in_fresh_process
from .results import ResultsError, method_record, parts_text
from .stats import Spread, spread
from .table import Table

logger = logging.getLogger(__name__)

SCHEMA = 2
"""2: `methods` in place of `method`; decoding, cache and memory."""
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
    new_tokens: int,
    memory: bool,
    device: str | None,
    dtype: str,
    attn_implementation: str,
    output_path: str | None,
) -> int:
    """The command; arguments are the flags of `vlmprune bench`. Returns the exit code."""
    if math.isqrt(tokens) ** 2 != tokens or width % 64:
        raise MethodFieldError(
            f"--tokens {tokens} must be a square (e.g. 576) and --width {width} a multiple of 64."
        )
    combinations = grid(
        [parse(text) for text in methods if text != "dense"], parse_budgets(budgets)
    )
    device = resolve_device(device)
    subject = Subject(
        layers=layers,
        width=width,
        visual_tokens=tokens,
        dtype=dtype,
        attn_implementation=attn_implementation,
    )
    variants = [Variant(parts) for parts in combinations]
    in_children = memory and torch.device(device).type == "cpu"
    with progress() as bar:
        rounds = bar.add_task("bench", total=(repeats + 1 + in_children) * len(variants))
        model = subject.model(device)
        cost = model_cost(model)
        inputs = subject.inputs(model)
        compare(model, inputs, variants, repeats, new_tokens, lambda: bar.advance(rounds))
        del model  # before others are made
        for variant in variants if in_children else ():
            threads = torch.get_num_threads()
            try:
                variant.peak_memory_bytes = in_fresh_process(
                    peak_memory, subject, variant.parts, new_tokens, threads
                )
            except MemoryMeasureError as error:  # the times are there
                logger.warning("%s: %s", variant.name, error)
            bar.advance(rounds)

    report = {
        "schema": SCHEMA,
        "model": asdict(subject) | {"text_tokens": _TEXT_TOKENS},
        "rounds": repeats,
        "new_tokens": new_tokens,
        "hardware": hardware(device),
        "versions": versions(),
        "variants": [v.as_json(cost) for v in variants],
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
    """The dense model (no `parts`) or a method, with what was measured of it and its oracle."""

    parts: Parts
    total: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    select: list[float] = field(default_factory=list)
    oracle: list[float] = field(default_factory=list)
    oracle_vision: list[float] = field(default_factory=list)
    per_decoded_token: list[float] = field(default_factory=list)
    vs_dense: list[float] = field(default_factory=list)
    decode_vs_dense: list[float] = field(default_factory=list)
    select_vs_dense_prefill: list[float] = field(default_factory=list)
    per_layer: list[int] = field(default_factory=list)
    grid: tuple[int, int] = (0, 0)
    """Rows and columns of the image's tokens."""
    cache_bytes: int = 0
    peak_memory_bytes: int | None = None
    """What prefill and decoding add, at their peak, to the loaded model."""

    @property
    def name(self) -> str:
        return parts_text(self.parts)

    def patched(self, model: PreTrainedModel) -> AbstractContextManager[Handle | None]:
        """The model as this variant has it, inside the block."""
        return patch(model, [part.call for part in self.parts]) if self.parts else nullcontext()

    def as_json(self, cost: ModelCost) -> dict[str, Any]:
        vision = [*self.vision, *self.oracle_vision]
        flops = cost.sample(
            pictures=[self.grid], visual_per_layer=self.per_layer, text_tokens=_TEXT_TOKENS
        )
        rest = [t - v - s for t, v, s in zip(self.total, self.vision, self.select, strict=True)]
        oracle_rest = [t - v for t, v in zip(self.oracle, self.oracle_vision, strict=True)]
        return {
            "name": self.name,
            "methods": [method_record(part) for part in self.parts],
            "kept": self.per_layer[-1],
            "average_per_layer": fmean(self.per_layer),
            "average_after_cuts": fmean(after_cuts(self.per_layer)),
            "first_token_flops": flops.first_token,
            "visual_share": visual_share(self.per_layer, self.grid[0] * self.grid[1], cost.decoder),
            "cache_bytes": self.cache_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "seconds": {
                "total": spread(self.total),
                "vision": spread(vision),
                "select": spread(self.select),
                "prefill": spread(rest),
                "oracle_total": spread(self.oracle),
                "oracle_prefill": spread(oracle_rest),
                "per_decoded_token": spread(self.per_decoded_token),
            },
            "speed_up": spread(self.vs_dense),
            "decode_speed_up": spread(self.decode_vs_dense),
            "select_over_dense_prefill": spread(self.select_vs_dense_prefill),
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
    new_tokens: int,
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

    def clock(call: Callable[[], Any]) -> tuple[Any, float, float]:
        """What the call gave, its seconds, and those of the vision encoder in it."""
        with module_seconds(tower, device) as vision:
            synchronise(device)
            start = time.perf_counter()
            result = call()
            synchronise(device)
            return result, time.perf_counter() - start, sum(vision)

    for number in range(repeats + 1):
        dense = dense_prefill = dense_step = math.nan
        for variant in variants:
            variant.grid, variant.per_layer = grid, [tokens] * layers
            cuts: list[tuple[int, Tensor]] = []
            select = oracle = oracle_vision = 0.0
            held = _reset_peak(device)
            with variant.patched(model) as handle:
                output, total, vision = clock(partial(prefill, model, inputs))
                if handle is not None:
                    select = handle.last.select_seconds
                    cuts = _cuts(handle)
                    variant.per_layer = handle.last.tokens_per_layer[0]
                variant.cache_bytes = kv_bytes(output.past_key_values)
                _, seconds, _ = clock(partial(decode, model, output, new_tokens))
                step = seconds / new_tokens
            del output
            if held is not None:
                added = torch.cuda.max_memory_allocated(device) - held
                variant.peak_memory_bytes = max(variant.peak_memory_bytes or 0, added)
            if variant.parts:
                _, oracle, oracle_vision = clock(partial(oracle_prefill, model, inputs, cuts))
            else:
                dense, dense_prefill, dense_step = total, total - vision, step
            advance()
            if number == 0:
                continue
            variant.total.append(total)
            variant.vision.append(vision)
            variant.select.append(select)
            variant.per_decoded_token.append(step)
            variant.vs_dense.append(dense / total)
            variant.decode_vs_dense.append(dense_step / step)
            if variant.parts:
                variant.select_vs_dense_prefill.append(select / dense_prefill)
                variant.oracle.append(oracle)
                variant.oracle_vision.append(oracle_vision)


def prefill(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    """One forward up to the logits of the first new token."""
    return model(**inputs, use_cache=True, logits_to_keep=1)


def decode(model: PreTrainedModel, output: Any, new_tokens: int) -> None:
    """Feed `new_tokens` random words behind a prefill, one after the other."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(10, 30000, (new_tokens, 1, 1), generator=generator)
    for word in words.to(output.logits.device):
        model(
            input_ids=word, past_key_values=output.past_key_values, use_cache=True, logits_to_keep=1
        )


def _reset_peak(device: torch.device) -> int | None:
    """Bytes that are allocated on CUDA now, from which the next peak counts; None elsewhere."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


@torch.inference_mode()
def peak_memory(subject: Subject, parts: Parts, new_tokens: int, threads: int) -> int:
    """Bytes that prefill and decoding add to the loaded model at their peak, on the CPU of a
    process that has nothing else to do."""
    torch.set_num_threads(threads)
    model = subject.model("cpu")
    inputs = subject.inputs(model)
    with Variant(parts).patched(model):
        return added_at_peak(lambda: decode(model, prefill(model, inputs), new_tokens))


def oracle_prefill(
    model: PreTrainedModel, inputs: dict[str, Tensor], cuts: Sequence[tuple[int, Tensor]]
) -> Tensor:
    """Prefill with as many tokens as were kept, known beforehand: the time is that of the kept
    ones, the logits are not (inside the decoder the final norm even runs once more).

    Args:
        cuts: (first layer that sees fewer tokens, numbers of visual tokens that are left, which may
            be none); of several for one layer the last counts.
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
    index_at = dict(cuts)
    starts = sorted({0, *index_at, len(layers)})
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


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is measured, by its sizes, and one picture between text tokens for it."""

    layers: int
    width: int
    visual_tokens: int
    dtype: str
    attn_implementation: str

    def model(self, device: str) -> PreTrainedModel:
        model = mid_size_llava(
            layers=self.layers, width=self.width, side=math.isqrt(self.visual_tokens)
        )
        model.set_attn_implementation(self.attn_implementation)
        return model.to(device, getattr(torch, self.dtype))

    def inputs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        parameter = next(model.parameters())
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(10, 30000, (_TEXT_TOKENS,), generator=generator)
        image = torch.full((self.visual_tokens,), _IMAGE_TOKEN)
        ids = torch.cat([text[:5], image, text[5:]])[None]
        side = math.isqrt(self.visual_tokens) * _PATCH
        pixels = torch.randn(1, 3, side, side, generator=generator)
        return {
            "input_ids": ids.to(parameter.device),
            "pixel_values": pixels.to(parameter.device, parameter.dtype),
        }


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


# --- The table -------------------------------------------------------------------------------


def bench_table(report: dict[str, Any]) -> Table:
    """The report of one run, as written to the result file; columns without any entry are left
    out."""
    model = report["model"]
    decoded = f" of {report['new_tokens']} new tokens" if "new_tokens" in report else ""
    rows = [_row(variant) for variant in report["variants"]]
    shown = [header for header in _HEADERS if any(row[header] for row in rows)]
    return Table(
        headers=tuple(shown),
        rows=[tuple(row[header] for header in shown) for row in rows],
        numbers_from=1,
        droppable=tuple(shown.index(header) for header in _DROPPABLE if header in shown),
        title=(
            f"LLaVA, random weights: {model['layers']} layers, width {model['width']}, "
            f"{model['visual_tokens']} visual + {model['text_tokens']} text tokens, "
            f"{model['dtype']}, {model['attn_implementation']}; {report['rounds']} rounds{decoded} "
            f"on {describe(report['hardware'])}"
        ),
        notes=" ".join(note for header, note in _NOTES.items() if header in shown),
    )


_HEADERS = (
    "Variant",
    "Avg/layer",
    "GFLOPs",
    "Vision ms",
    "Choice ms",
    "of dense prefill %",
    "Prefill ms",
    "Total ms [quartiles]",
    "Speed-up",
    "Oracle total ms",
    "Oracle/patched %",
    "in the LLM %",
    "ms/token [quartiles]",
    "Speed-up of decoding",
    "Cache MiB",
    "Peak MiB",
)
_DROPPABLE = (
    "GFLOPs",
    "Avg/layer",
    "Vision ms",
    "Speed-up of decoding",
    "Choice ms",
    "Prefill ms",
    "Oracle total ms",
    "in the LLM %",
)
_NOTES = {
    "Variant": "Medians over rounds; ratios are taken within a round.",
    "Choice ms": "Choice: inside the decoder with reading scores; before the LLM without, they are "
    "a part of vision.",
    "Prefill ms": "Prefill: the LLM without vision and choice.",
    "Total ms [quartiles]": "Total: one forward up to the first token's logits.",
    "Oracle total ms": "Oracle: the unpatched language model on the kept tokens, after the full "
    "vision encoder.",
    "ms/token [quartiles]": "ms/token: of the tokens decoded after that.",
    "Cache MiB": "Cache: keys and values after prefill.",
    "Peak MiB": "Peak: what prefill and decoding add to the loaded model.",
}


def _row(variant: dict[str, Any]) -> dict[str, str]:
    """The cells of one line by their headers; older reports lack some of the numbers."""
    seconds = variant["seconds"]
    pruned = variant["name"] != "dense"
    return {
        "Variant": variant["name"],
        "Avg/layer": f"{variant['average_per_layer']:.1f}",
        "GFLOPs": f"{variant['first_token_flops'] / 1e9:.4g}",
        "Vision ms": _ms(seconds["vision"]),
        "Choice ms": _ms(seconds["select"]) if pruned else "",
        "of dense prefill %": _percent(variant.get("select_over_dense_prefill")),
        "Prefill ms": _ms(seconds["prefill"]),
        "Total ms [quartiles]": _ms_range(seconds["total"]),
        "Speed-up": _times(variant["speed_up"]),
        "Oracle total ms": _ms_range(seconds["oracle_total"]),
        "Oracle/patched %": _percent(variant["oracle_over_patched"]),
        "in the LLM %": _percent(variant["oracle_over_patched_prefill"]),
        "ms/token [quartiles]": _ms_range(seconds.get("per_decoded_token"), digits=1),
        "Speed-up of decoding": _times(variant.get("decode_speed_up")),
        "Cache MiB": _mib(variant.get("cache_bytes")),
        "Peak MiB": _mib(variant.get("peak_memory_bytes")),
    }


def _ms(value: Spread | None) -> str:
    return f"{1e3 * value['median']:.1f}" if value else ""


def _ms_range(value: Spread | None, digits: int = 0) -> str:
    if not value:
        return ""
    median, q1, q3 = (f"{1e3 * value[key]:.{digits}f}" for key in ("median", "q1", "q3"))
    return f"{median} [{q1}, {q3}]"


def _times(value: Spread | None) -> str:
    return f"{value['median']:.2f}x" if value else ""


def _mib(size: int | None) -> str:
    return f"{size / 2**20:.1f}" if size is not None else ""


def _percent(value: Spread | None) -> str:
    return f"{100 * value['median']:.1f}" if value else ""
