"""Answers of a model to a batch of prompts, and the tokens and FLOPs that they took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...adapters.family import MODALITIES
from ...adapters.handle import Handle
from ...adapters.registry import family_of
from ...adapters.report import Last
from ...prune.contract import Thinned
from ...prune.thinned import thinned_layers
from ..results.records import FlopsRecord, Tokens
from .flops import NOTHING, Flops, ModelCost, after_cuts, cache_entries, visual_flops, visual_share
from .shortened import Grid, Shortened, measured

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What the dense model would be given, where pictures were made smaller for a prompt."""

    visual: int
    text_tokens: int
    pictures: list[tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model said to one prompt, and what it took. Videos count as images."""

    text: str
    images: int
    visual: int
    """Visual tokens of the prompt; of pictures that were made smaller, before that."""
    kept: int
    """Rows for them that are alive after the last cut."""
    per_layer: list[int]
    """Visual tokens that entered each decoder layer."""
    text_tokens: int
    generated: int
    """New tokens, the end token included."""
    pictures: list[tuple[int, int]]
    """Rows and columns of every picture that the vision encoder saw."""
    shortened: list[Shortened | None]
    """How rows of each left in the encoder; None: they did not."""
    unread_layers: int
    """Layers at the end of the vision encoder that did not run."""
    cache_entries: int | None
    """Entries of the prompt in reach of a new token, where a method on the cache limits them."""
    cache_visual: float | None
    """Visual ones among these, a mean over layers: as many as were found, or, of a method that
    evicts nothing, as many as it may be."""
    thinned: Mapping[int, Thinned] = field(default_factory=dict)
    """By decoder layer, what was left out of it beside tokens."""
    whole: Whole | None = None
    """None: the pictures were not made smaller."""

    def beside(self, whole: Whole) -> Answer:
        """The same answer, as one on smaller pictures."""
        return replace(self, visual=whole.visual, whole=whole)


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    processor: Any,
    inputs: Mapping[str, Any],
    handle: Handle | None,
    *,
    images: Sequence[int],
    videos: Sequence[int] | None = None,
    **generate: Any,
) -> list[Answer]:
    """Run `generate` once.

    Args:
        inputs: of the processor, left-padded, on the model's device.
        handle: of the patch on the model, if any.
        images, videos: how many each prompt has.
        **generate: further arguments of `generate`.
    """
    output = model.generate(**inputs, **generate)
    return answers_of(model, processor, inputs, output, handle, images=images, videos=videos)


def answers_of(
    model: PreTrainedModel,
    processor: Any,
    inputs: Mapping[str, Any],
    output: Tensor,
    handle: Handle | None,
    *,
    images: Sequence[int],
    videos: Sequence[int] | None = None,
) -> list[Answer]:
    """What `generate` has just said; see `answer`.

    Args:
        output: (B, L) the prompts and what follows them.
    """
    new = output[:, inputs["input_ids"].shape[1] :]
    texts = processor.batch_decode(new, skip_special_tokens=True)
    counts = {"image": list(images), "video": list(videos or [0] * len(images))}
    visual = _visual_tokens(model, inputs)
    real = inputs["attention_mask"].sum(1).tolist()
    num_layers = family_of(model).shape.decoder.num_layers
    last = handle.last if handle is not None and any(visual) else None
    pictures = _pictures(model, inputs, counts, handle, last)
    answers = []
    left = last.cache_kept if last is not None else None
    thinned: Mapping[int, Thinned] = {}
    if handle is not None and last is not None:
        thinned = thinned_layers(handle.methods, family_of(model).shape)
    for row, text in enumerate(texts):
        text_tokens = real[row] - visual[row]
        reach = _reach(handle, last, row, text_tokens)
        answers.append(
            Answer(
                text=text,
                images=sum(per_row[row] for per_row in counts.values()),
                visual=visual[row],
                kept=sum(_of_row(last, last.tokens_kept, row)) if last else visual[row],
                per_layer=last.tokens_per_layer[row] if last else [visual[row]] * num_layers,
                text_tokens=text_tokens,
                generated=_length(model, new[row].tolist()),
                pictures=[grid for grid, _ in pictures[row]],
                shortened=[shortened for _, shortened in pictures[row]],
                unread_layers=handle.unread_layers if handle is not None else 0,
                cache_entries=reach,
                thinned=thinned,
                cache_visual=fmean(left[row])
                if left is not None
                else None
                if reach is None
                else max(0, min(reach - text_tokens, visual[row])),
            )
        )
    return answers


def wholes(model: PreTrainedModel, inputs: Mapping[str, Any], images: Sequence[int]) -> list[Whole]:
    """What prompts hold, without running the model; as many images in each."""
    visual = _visual_tokens(model, inputs)
    real = inputs["attention_mask"].sum(1).tolist()
    counts = {"image": list(images), "video": [0] * len(images)}
    pictures = _pictures(model, inputs, counts, None, None)
    return [
        Whole(visual=n, text_tokens=whole - n, pictures=[grid for grid, _ in seen])
        for n, whole, seen in zip(visual, real, pictures, strict=True)
    ]


def tokens_of(answers: Sequence[Answer]) -> Tokens:
    """Means over answers (and per image over their images)."""
    images = sum(a.images for a in answers) or 1
    layers = len(answers[0].per_layer)
    per_layer = [fmean(a.per_layer[i] for a in answers) for i in range(layers)]
    found = Tokens(
        in_per_image=sum(a.visual for a in answers) / images,
        kept_per_image=sum(a.kept for a in answers) / images,
        average_per_layer=fmean(per_layer),
        average_after_cuts=fmean(after_cuts(per_layer)),
        per_layer=per_layer,
        text=fmean(a.text_tokens for a in answers),
        generated=fmean(a.generated for a in answers),
    )
    left = [a.cache_visual for a in answers]
    if any(entries is not None for entries in left):
        whole = (a.visual if a.cache_visual is None else a.cache_visual for a in answers)
        found["cache_per_image"] = sum(whole) / images
    return found


def flops_of(answers: Sequence[Answer], cost: ModelCost) -> FlopsRecord:
    """Means over answers, and what they are of the dense model's."""
    pruned: list[Flops] = []
    dense: list[Flops] = []
    for a in answers:
        for target, of, per_layer, unread, entries, shortened, thinned in (
            (pruned, a, a.per_layer, a.unread_layers, a.cache_entries, a.shortened, a.thinned),
            (dense, a.whole or a, [a.visual] * len(a.per_layer), 0, None, None, NOTHING),
        ):
            target.append(
                cost.sample(
                    pictures=of.pictures,
                    visual_per_layer=per_layer,
                    text_tokens=of.text_tokens,
                    new_tokens=a.generated,
                    unread_layers=unread,
                    cache_entries=entries,
                    shortened=shortened,
                    thinned=thinned,
                )
            )
    return FlopsRecord(
        vision=fmean(f.vision for f in pruned),
        projector=fmean(f.projector for f in pruned),
        prefill=fmean(f.prefill for f in pruned),
        lm_head=fmean(f.lm_head for f in pruned),
        decode=fmean(f.decode for f in pruned),
        first_token=fmean(f.first_token for f in pruned),
        visual=fmean(visual_flops(a.per_layer, cost.decoder) for a in answers),
        visual_share=fmean(visual_share(a.per_layer, a.visual, cost.decoder) for a in answers),
        prefill_share=sum(f.prefill for f in pruned) / sum(f.prefill for f in dense),
        first_token_share=sum(f.first_token for f in pruned) / sum(f.first_token for f in dense),
    )


def _reach(handle: Handle | None, last: Last | None, row: int, text_tokens: int) -> int | None:
    """Entries of a prompt in reach of a new token; None: all."""
    if handle is None or last is None:
        return None
    return cache_entries(handle.methods, _of_row(last, last.tokens_in, row), text_tokens)


def _of_row(last: Last, per_image: Sequence[int], row: int) -> list[int]:
    return [value for value, of in zip(per_image, last.image_sample, strict=True) if of == row]


def _visual_tokens(model: PreTrainedModel, inputs: Mapping[str, Any]) -> list[int]:
    """Placeholders of each row."""
    ids = inputs["input_ids"]
    placeholders = [
        getattr(model.config, modality.token)
        for modality in family_of(model).modalities
        if getattr(model.config, modality.token, None) is not None
    ]
    return torch.isin(ids, torch.tensor(placeholders, device=ids.device)).sum(1).tolist()


def _pictures(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    counts: Mapping[str, Sequence[int]],
    handle: Handle | None,
    last: Last | None,
) -> list[list[tuple[Grid, Shortened | None]]]:
    """What the encoder saw of each row's images and videos, and how it shortened them."""
    family = family_of(model)
    given = [modality for modality in MODALITIES if family.gives(inputs, modality)]
    seen = [family.pictures(family.call(modality, inputs)) for modality in given]
    flat = [[grid for of_image in of_all for grid in of_image] for of_all in seen]
    shortened = measured(handle, last, flat, family.shape)
    rows: list[list[tuple[Grid, Shortened | None]]] = [[] for _ in counts["image"]]
    for modality, of_all, own in zip(given, seen, shortened, strict=True):
        images, left = iter(of_all), iter(own)
        for row, count in enumerate(counts[modality.name]):
            for _ in range(count):
                rows[row] += [(grid, next(left)) for grid in next(images)]
    return rows


def _length(model: PreTrainedModel, new_tokens: Sequence[int]) -> int:
    """Tokens generated up to the end of the answer, the end token included."""
    ids = model.generation_config.eos_token_id
    ends = {ids} if isinstance(ids, int) else set(ids or ())
    for count, token in enumerate(new_tokens, start=1):
        if token in ends:
            return count
    return len(new_tokens)
