"""`vlmprune bench model`: dense, oracle and patched prefill of one model, side by side, and the
tokens decoded after it.

The oracle is the unpatched language model on hidden states that already have the kept number of
visual tokens (per stretch of layers, for a method that cuts in the decoder), with the full vision
encoder before it: the time if choosing and bookkeeping cost nothing. Oracle time / patched time is
how close the code is to its limit. A method on the KV cache removes nothing from the prefill: its
oracle is the dense model's. Random weights change no time (but what an adaptive rule finds). A
model that the machine cannot hold is not run: FLOPs and bytes follow from sizes alone.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from ..adapters.family import IMAGE
from ..adapters.patching import Handle, patch
from ..adapters.registry import family_of
from ..adapters.report import Stopwatch
from ..prune.budget import plan, tokens_per_layer
from ..prune.contract import Compressing
from ..prune.errors import MethodFieldError
from .compose import Parts, grid, parse, parse_budgets
from .console import progress, stdout
from .energy import EnergyMeter, energy_meter
from .environment import describe, hardware, versions
from .flops import ModelCost, after_cuts, cache_entries, model_cost, visual_share
from .loading import ModelLoadError, load, path_of, resolve_device, short_name
from .measure import kv_bytes
from .memory import MemoryMeasureError, added_at_peak, free_memory, in_fresh_process
from .results import ResultsError, method_record, parts_text
from .shapes import TEXT_TOKENS, mid_size, prompt, shape, usual_picture, words
from .stats import Spread, spread
from .table import Table

logger = logging.getLogger(__name__)

SCHEMA = 3
"""2: `methods` in place of `method`; decoding, cache and memory. 3: any model; `measured`, without
which there are no times; batches; energy."""


def run(
    *,
    methods: Sequence[str],
    budgets: Sequence[str],
    shape_name: str | None,
    model_name: str | None,
    picture: tuple[int, int] | None,
    image: str | None,
    layers: int,
    width: int,
    tokens: int,
    batch_size: int,
    repeats: int,
    new_tokens: int,
    memory: bool,
    meta: bool,
    device: str | None,
    dtype: str,
    attn_implementation: str,
    output_path: str | None,
) -> int:
    """The command; arguments are the flags of `vlmprune bench model`. Returns the exit code."""
    if math.isqrt(tokens) ** 2 != tokens or width % 64:
        raise MethodFieldError(
            f"--tokens {tokens} must be a square (e.g. 576) and --width {width} a multiple of 64."
        )
    combinations = grid(
        [parse(text) for text in methods if text != "dense"], parse_budgets(budgets)
    )
    device = resolve_device(device)
    chosen = dtype
    if dtype == "auto":
        chosen = "float32" if torch.device(device).type == "cpu" else "bfloat16"
    subject = Subject(
        shape=shape_name,
        model_name=model_name,
        picture=picture,
        layers=layers,
        width=width,
        visual_tokens=tokens,
        batch_size=batch_size,
        dtype=chosen,
        attn_implementation=attn_implementation,
        image=image,
    )
    variants = [Variant(parts) for parts in combinations]
    meta = meta or not _fits(subject, device)
    if meta and dtype == "auto":  # as it would run where it fits
        subject = replace(subject, dtype="bfloat16")

    def save() -> dict[str, Any]:
        """The report so far, also in the file."""
        report = {
            "schema": SCHEMA,
            "measured": not meta,
            "model": subject.as_json(),
            "rounds": max(len(v.total) for v in variants),
            "rounds_wanted": 0 if meta else repeats,
            "new_tokens": new_tokens,
            "hardware": hardware(device),
            "versions": versions(),
            "variants": [v.as_json(cost) for v in variants if v.per_layer],
        }
        if output_path:
            _write(output_path, report)
        return report

    if meta:
        cost = model_cost(subject.model("meta"))
        for variant in variants:
            variant.reckon(subject)
        bench_table(save()).print(stdout())
        return 0
    in_children = memory and torch.device(device).type == "cpu"
    with progress() as bar:
        rounds = bar.add_task("bench", total=(repeats + 1 + in_children) * len(variants))
        model = subject.model(device)
        cost = model_cost(model)
        inputs = subject.inputs(device)
        for number in range(repeats + 1):
            compare(model, inputs, variants, new_tokens, number > 0, lambda: bar.advance(rounds))
            save()
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
            save()
    bench_table(save()).print(stdout())
    return 0


def _fits(subject: Subject, device: str) -> bool:
    """Whether weights, and half as much again for what runs through them, fit in free memory."""
    if subject.model_name is not None:
        return True  # asked for by name: loading says what is wrong
    needed = int(1.5 * subject.parameter_bytes())
    free = free_memory(device)
    if free is None or needed <= free:
        return True
    logger.warning(
        "%s needs about %.0f GiB and %.1f are free: FLOPs and bytes only, nothing is run.",
        subject.name,
        needed / 2**30,
        free / 2**30,
    )
    return False


def _write(output_path: str, report: Mapping[str, Any]) -> None:
    """All or nothing, so that an interrupt leaves the last whole report."""
    path = Path(output_path)
    try:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ResultsError(f"{output_path!r} cannot be written: {error.strerror}.") from error


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
    joules: list[float] = field(default_factory=list)
    joules_per_decoded_token: list[float] = field(default_factory=list)
    per_layer: list[int] = field(default_factory=list)
    """Visual tokens of a prompt that enter each layer."""
    visual_tokens: int = 0
    text_tokens: int = 0
    pictures: list[tuple[int, int]] = field(default_factory=list)
    """Rows and columns of what the encoder sees of a prompt."""
    at_most: bool = False
    """Whether the counts are those that an adaptive rule may not exceed."""
    cache_bytes: int = 0
    peak_memory_bytes: int | None = None
    """What prefill and decoding add, at their peak, to the loaded model."""

    @property
    def name(self) -> str:
        return parts_text(self.parts)

    def patched(self, model: PreTrainedModel) -> AbstractContextManager[Handle | None]:
        """The model as this variant has it, inside the block."""
        return patch(model, [part.call for part in self.parts]) if self.parts else nullcontext()

    def reckon(self, subject: Subject) -> None:
        """Counts and bytes from sizes alone.

        Raises:
            BudgetError: the budget cannot be reached.
        """
        model = subject.model("meta")
        family, inputs = family_of(model), subject.inputs("meta")
        config: Any = family.text_model(model).config
        calls = [part.call for part in self.parts]
        model_shape = family.shape(model)
        self.pictures = list(family.pictures(model, IMAGE, inputs)[0])
        self.visual_tokens = _visual_tokens(model, inputs)
        stages = plan(self.visual_tokens, calls, model_shape)
        self.at_most = any(stage.adaptive for stage in stages)
        self.per_layer = tokens_per_layer(
            self.visual_tokens, stages, model_shape.decoder.num_layers
        )
        text = int(inputs["input_ids"].shape[1]) - self.visual_tokens
        self.text_tokens = text
        # Those that only attend to less keep everything.
        compressing = [call for call in calls if isinstance(call.method, Compressing)]
        most = cache_entries(compressing, [self.visual_tokens], text)
        entries = sum(min(n + text, n + text if most is None else most) for n in self.per_layer)
        head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        per_entry = 2 * config.num_key_value_heads * head * getattr(torch, subject.dtype).itemsize
        self.cache_bytes = entries * per_entry * subject.batch_size

    def as_json(self, cost: ModelCost) -> dict[str, Any]:
        vision = [*self.vision, *self.oracle_vision]
        flops = cost.sample(
            pictures=self.pictures, visual_per_layer=self.per_layer, text_tokens=self.text_tokens
        )
        rest = [t - v - s for t, v, s in zip(self.total, self.vision, self.select, strict=True)]
        oracle_rest = [t - v for t, v in zip(self.oracle, self.oracle_vision, strict=True)]
        return {
            "name": self.name,
            "methods": [method_record(part) for part in self.parts],
            "kept": self.per_layer[-1],
            "at_most": self.at_most,
            "average_per_layer": fmean(self.per_layer),
            "average_after_cuts": fmean(after_cuts(self.per_layer)),
            "first_token_flops": flops.first_token,
            "visual_share": visual_share(self.per_layer, self.visual_tokens, cost.decoder),
            "cache_bytes": self.cache_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "joules": {
                "first_token": spread(self.joules),
                "per_decoded_token": spread(self.joules_per_decoded_token),
            },
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
    new_tokens: int,
    counted: bool = True,
    advance: Callable[[], None] = lambda: None,
) -> None:
    """One round: all variants in turn, the first of which is dense.

    Args:
        counted: whether its times enter the variants; the first round only warms up.
    """
    family = family_of(model)
    tower = family.vision_tower(model)
    device = model.get_input_embeddings().weight.device
    meter = energy_meter(device)
    layers = family.shape(model).decoder.num_layers
    visual = _visual_tokens(model, inputs)
    pictures = list(family.pictures(model, IMAGE, inputs)[0])
    dense = dense_prefill = dense_step = math.nan
    for variant in variants:
        variant.pictures, variant.visual_tokens = pictures, visual
        variant.text_tokens = inputs["input_ids"].shape[1] - visual
        variant.per_layer = [visual] * layers
        cuts: list[tuple[int, Tensor]] = []
        select = 0.0
        oracle = _Clocked(0.0, 0.0, None)
        held = _reset_peak(device)
        with variant.patched(model) as handle:
            output, first = _clock(partial(prefill, model, inputs), tower, device, meter)
            if handle is not None:
                select = handle.last.select_seconds
                cuts = _cuts(handle)
                variant.per_layer = _longest(handle)
            variant.cache_bytes = kv_bytes(output.past_key_values)
            _, rest = _clock(partial(decode, model, output, new_tokens), tower, device, meter)
            step = rest.seconds / new_tokens
        del output
        if held is not None:
            added = torch.cuda.max_memory_allocated(device) - held
            variant.peak_memory_bytes = max(variant.peak_memory_bytes or 0, added)
        if variant.parts:
            _, oracle = _clock(partial(oracle_prefill, model, inputs, cuts), tower, device, meter)
        else:
            dense, dense_prefill, dense_step = first.seconds, first.seconds - first.vision, step
        advance()
        if not counted:
            continue
        variant.total.append(first.seconds)
        variant.vision.append(first.vision)
        variant.select.append(select)
        variant.per_decoded_token.append(step)
        variant.vs_dense.append(dense / first.seconds)
        variant.decode_vs_dense.append(dense_step / step)
        if first.joules is not None and rest.joules is not None:
            variant.joules.append(first.joules)
            variant.joules_per_decoded_token.append(rest.joules / new_tokens)
        if variant.parts:
            variant.select_vs_dense_prefill.append(select / dense_prefill)
            variant.oracle.append(oracle.seconds)
            variant.oracle_vision.append(oracle.vision)


@dataclass(frozen=True)
class _Clocked:
    """Seconds of a call, those of the vision encoder in it, and its energy where it is known."""

    seconds: float
    vision: float
    joules: float | None


def _clock(
    call: Callable[[], Any], tower: Any, device: torch.device, meter: EnergyMeter | None
) -> tuple[Any, _Clocked]:
    """What a call gives, and what it took; on CUDA by events, so that nothing waits in between."""
    total, vision = Stopwatch(device), Stopwatch(device)
    hooks = (
        tower.register_forward_pre_hook(lambda *_: vision.__enter__() and None),
        tower.register_forward_hook(lambda *_: vision.__exit__(None, None, None)),
    )
    try:
        before = meter.joules() if meter else 0.0
        with total:
            result = call()
        seconds = total.seconds  # waits for the device
        joules = meter.joules() - before if meter else None
    finally:
        for hook in hooks:
            hook.remove()
    return result, _Clocked(seconds, vision.seconds, joules)


def _visual_tokens(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> int:
    """Of each prompt; all have as many."""
    return int((inputs["input_ids"][0] == model.config.image_token_id).sum())


def prefill(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Any:
    """One forward up to the logits of the first new token."""
    return model(**inputs, use_cache=True, logits_to_keep=1)


def decode(model: PreTrainedModel, output: Any, new_tokens: int) -> None:
    """Feed `new_tokens` random words behind a prefill, one after the other."""
    fed = words(model.config, new_tokens, seed=1).to(output.logits.device)
    batch_size = len(output.logits)
    for word in fed:
        model(
            input_ids=word.expand(batch_size, 1),
            past_key_values=output.past_key_values,
            use_cache=True,
            logits_to_keep=1,
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
    inputs = subject.inputs("cpu")
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
    other = ("input_ids", "attention_mask", "mm_token_type_ids")
    encoded = core.get_image_features(**{k: v for k, v in inputs.items() if k not in other})
    features = torch.cat(list(encoded.pooler_output))
    hidden = model.get_input_embeddings()(ids)
    visual = ids[0] == model.config.image_token_id
    hidden[:, visual] = features.to(hidden.dtype).view(len(ids), -1, hidden.shape[-1])
    # Qwen3-VL adds features of its own to the first layers.
    deep = [torch.cat(list(x)) for x in getattr(encoded, "deepstack_features", None) or []]
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
            hidden = text_model(
                inputs_embeds=hidden, use_cache=True, **_deep(deep[start:], visual, alive, len(ids))
            ).last_hidden_state
    finally:
        text_model.layers = layers
    return model.get_output_embeddings()(hidden[:, -1:])


def _deep(
    features: Sequence[Tensor], visual: Tensor, alive: Tensor, batch_size: int
) -> dict[str, Any]:
    """Features of the layers to come, for the visual tokens that are alive."""
    if not features:
        return {}
    kept = (alive[visual[alive]] - visual.nonzero()[0]).to(features[0].device)
    return {
        "visual_pos_masks": visual[alive].expand(batch_size, -1),
        "deepstack_visual_embeds": [
            x.view(batch_size, -1, x.shape[-1])[:, kept].flatten(0, 1) for x in features
        ],
    }


def _longest(handle: Handle) -> list[int]:
    """Visual tokens per layer of the longest sample, which the others are padded to: adaptive
    rules find different counts."""
    return [max(layer) for layer in zip(*handle.last.tokens_per_layer, strict=True)]


def _cuts(handle: Handle) -> list[tuple[int, Tensor]]:
    """Counts decide: rows of merged tokens have no number of their own."""
    entering = _longest(handle)
    before = [max(handle.last.tokens_in), *entering]
    return [
        (layer, torch.arange(now))
        for layer, (was, now) in enumerate(zip(before, entering, strict=False))
        if now != was
    ]


# --- The model -------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The model that is measured (a named shape, a checkpoint, or a LLaVA by its sizes), and
    pictures between text tokens for it."""

    shape: str | None = None
    model_name: str | None = None
    picture: tuple[int, int] | None = None
    image: str | None = None
    """A file; else noise of the size of `picture`."""
    layers: int = 12
    width: int = 1024
    visual_tokens: int = 576
    batch_size: int = 1
    dtype: str = "float32"
    attn_implementation: str = "sdpa"

    @property
    def name(self) -> str:
        if self.model_name is not None:
            return short_name(self.model_name)
        return f"{self.shape or 'LLaVA'}, random weights"

    def config(self) -> PreTrainedConfig:
        if self.model_name is not None:
            from transformers import AutoConfig

            try:
                return AutoConfig.from_pretrained(path_of(self.model_name))
            except (OSError, ValueError) as error:
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ModelLoadError(
                    f"Model {self.model_name!r} cannot be loaded: {first} Give embedded, a folder, "
                    f"a name on the Hugging Face Hub, or --shape for random weights."
                ) from error
        if self.shape is not None:
            return shape(self.shape).config()
        side = math.isqrt(self.visual_tokens)
        return mid_size(layers=self.layers, width=self.width, side=side)

    def model(self, device: str) -> PreTrainedModel:
        """On the device `meta` there are sizes only."""
        if self.model_name is not None and device != "meta":
            model, _ = load(
                self.model_name,
                dtype=self.dtype,
                attn_implementation=self.attn_implementation,
                device=device,
            )
            return model
        torch.manual_seed(0)
        dtype = getattr(torch, self.dtype)
        with torch.device(device):
            model = AutoModelForImageTextToText.from_config(
                self.config(), dtype=dtype, attn_implementation=self.attn_implementation
            )
        return model.eval().to(dtype)

    def inputs(self, device: str) -> dict[str, Tensor]:
        if self.image is not None:
            return self._of_image(device)
        config = self.config()
        usual = shape(self.shape).picture if self.shape else usual_picture(config)
        made = prompt(config, self.picture or usual, batch_size=self.batch_size, device=device)
        pixels = made["pixel_values"].to(getattr(torch, self.dtype))
        return made | {"pixel_values": pixels}

    def _of_image(self, device: str) -> dict[str, Tensor]:
        """What the checkpoint's processor makes of the file and a question, once a sample."""
        if self.model_name is None:
            raise MethodFieldError(
                f"--image {self.image!r} needs a processor, so --model: random weights see noise."
            )
        from PIL import Image
        from transformers import AutoProcessor

        try:
            with Image.open(str(self.image)) as file:
                picture = file.convert("RGB")
            processor: Any = AutoProcessor.from_pretrained(path_of(self.model_name))
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"--image {self.image!r}: {error}") from error
        content = [{"type": "image"}, {"type": "text", "text": "what is in the picture ?"}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        made = processor(images=[picture], text=[text], return_tensors="pt")
        dtype = getattr(torch, self.dtype)
        return {
            name: value.repeat(self.batch_size, *[1] * (value.dim() - 1)).to(
                "cpu" if device == "meta" else device,
                dtype if value.is_floating_point() else value.dtype,
            )
            for name, value in made.items()
        }

    def parameter_bytes(self) -> int:
        model = self.model("meta")
        return sum(p.numel() * p.element_size() for p in model.parameters())

    def as_json(self) -> dict[str, Any]:
        model = self.model("meta")
        decoder = family_of(model).shape(model).decoder
        inputs = self.inputs("meta")
        visual = _visual_tokens(model, inputs)
        return {
            "name": self.name,
            "layers": decoder.num_layers,
            "width": decoder.hidden_size,
            "visual_tokens": visual,
            "text_tokens": int(inputs["input_ids"].shape[1]) - visual,
            "batch_size": self.batch_size,
            "parameters": sum(p.numel() for p in model.parameters()),
            "parameter_bytes": self.parameter_bytes(),
            "dtype": self.dtype,
            "attn_implementation": self.attn_implementation,
        }


# --- The table -------------------------------------------------------------------------------


def bench_table(report: dict[str, Any]) -> Table:
    """The report of one run, as written to the result file; columns without any entry are left
    out."""
    model, measured = report["model"], report.get("measured", True)
    decoded = f" of {report['new_tokens']} new tokens" if "new_tokens" in report else ""
    rows = [_row(variant) for variant in report["variants"]]
    shown = [header for header in _HEADERS if any(row[header] for row in rows)]
    return Table(
        headers=tuple(shown),
        rows=[tuple(row[header] for header in shown) for row in rows],
        numbers_from=1,
        droppable=tuple(shown.index(header) for header in _DROPPABLE if header in shown),
        title=(
            f"{model.get('name', 'LLaVA, random weights')}: {_sizes(model)}, {model['dtype']}, "
            f"{model['attn_implementation']}; "
        )
        + (
            f"{report['rounds']} rounds{decoded} on {describe(report['hardware'])}"
            if measured
            else "NOT RUN, reckoned from sizes"
        ),
        notes=" ".join(
            note
            for header, note in _NOTES.items()
            if header in shown and (measured or header in _RECKONED)
        ),
    )


def _sizes(model: Mapping[str, Any]) -> str:
    """Older reports say less."""
    parts = [f"{model['layers']} layers", f"width {model['width']}"]
    if "parameters" in model:
        size = f"{model['parameter_bytes'] / 2**30:.1f} GiB"
        parts.insert(0, f"{model['parameters'] / 1e9:.2f} B parameters ({size})")
    parts.append(f"{model['visual_tokens']} visual + {model['text_tokens']} text tokens")
    if model.get("batch_size", 1) > 1:
        parts.append(f"batch of {model['batch_size']}")
    return ", ".join(parts)


def shapes_table(reports: Sequence[dict[str, Any]], method: str) -> Table:
    """What one method leaves of several models, from reports that were reckoned."""
    rows = []
    for report in reports:
        model = report["model"]
        for variant in report["variants"]:
            names = [part["name"] for part in variant["methods"]]
            if names in ([], [method]):
                cells = _row(variant)
                dense = not names
                rows.append(
                    (
                        model["name"].removesuffix(", random weights") if dense else "",
                        f"{model['parameters'] / 1e9:.2f} B" if dense else "",
                        *(cells[header] for header in ("Variant", *_RECKONED)),
                    )
                )
    return Table(
        headers=("Model", "Parameters", "Variant", *_RECKONED),
        rows=rows,
        numbers_from=3,
        notes=f"One picture and {TEXT_TOKENS} words, {reports[0]['model']['dtype']}. GFLOPs: up to "
        f"the first token, vision included. {_NOTES['Share %']} {_NOTES['Cache MiB']}",
    )


_HEADERS = (
    "Variant",
    "Avg/layer",
    "GFLOPs",
    "Share %",
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
    "Energy J",
    "J/token",
)
_RECKONED = ("Avg/layer", "GFLOPs", "Share %", "Cache MiB")
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
    "Avg/layer": "Avg/layer: visual tokens that enter a decoder layer (<=: the most that an "
    "adaptive rule may keep).",
    "Share %": "Share: of the dense decoder FLOPs, visual tokens only.",
    "Choice ms": "Choice: inside the decoder with reading scores; before the LLM without, they are "
    "a part of vision.",
    "Prefill ms": "Prefill: the LLM without vision and choice.",
    "Total ms [quartiles]": "Total: one forward up to the first token's logits.",
    "Oracle total ms": "Oracle: the unpatched language model on the kept tokens, after the full "
    "vision encoder.",
    "ms/token [quartiles]": "ms/token: of the tokens decoded after that.",
    "Cache MiB": "Cache: keys and values after prefill.",
    "Peak MiB": "Peak: what prefill and decoding add to the loaded model.",
    "Energy J": "Energy: of the accelerator up to the first token, and of each token after it.",
}


def _row(variant: dict[str, Any]) -> dict[str, str]:
    """The cells of one line by their headers; older reports lack some of the numbers."""
    seconds = variant["seconds"]
    pruned = variant["name"] != "dense"
    joules = variant.get("joules", {})
    average = f"{variant['average_per_layer']:.1f}"
    return {
        "Variant": variant["name"],
        "Avg/layer": f"<= {average}" if variant.get("at_most") else average,
        "GFLOPs": f"{variant['first_token_flops'] / 1e9:.4g}",
        "Share %": "" if seconds["total"] else f"{100 * variant['visual_share']:.1f}",
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
        "Energy J": _joules(joules.get("first_token")),
        "J/token": _joules(joules.get("per_decoded_token")),
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


def _joules(value: Spread | None) -> str:
    return f"{value['median']:.3g}" if value else ""


def _mib(size: int | None) -> str:
    return f"{size / 2**20:.1f}" if size is not None else ""


def _percent(value: Spread | None) -> str:
    return f"{100 * value['median']:.1f}" if value else ""
