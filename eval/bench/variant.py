"""One line of a bench: the dense model or a method, with what was measured of it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
from transformers import PreTrainedModel

from ...adapters.clip_text import ClipText
from ...adapters.family import IMAGE
from ...adapters.handle import Handle
from ...adapters.patching import patch
from ...adapters.registry import family_of
from ...adapters.sequence.masks import STATES, layer_kind
from ...prune.budget import MethodCall, plan, tokens_per_layer
from ...prune.contract import Compressing, Place, Thinned
from ...prune.thinned import thinned_layers
from ..measure.flops import ModelCost, after_cuts, cache_entries, visual_share
from ..measure.shortened import Shortened, reckoned
from ..results.records import method_record
from ..results.statistics import spread
from ..words.parts import Parts
from ..words.said import parts_text
from .subject import Subject, visual_tokens_of


@dataclass
class Run:
    """Seconds of one run up to the first token's logits, and of the tokens decoded after it."""

    total: float
    vision: float
    """Of the total: in the vision encoder, reading scores included."""
    select: float = 0.0
    """Of the total: choosing; inside the decoder with reading scores, in the encoder a part of
    `vision`."""
    per_decoded_token: float | None = None
    """The median of the steps; None where such a step cannot be run."""
    joules: float | None = None
    joules_per_decoded_token: float | None = None

    @property
    def rest(self) -> float:
        """The language model with all that choosing costs."""
        return self.total - self.vision


@dataclass(frozen=True)
class Round:
    """The runs of one variant in one round, beside the dense model's of the same round."""

    dense: Run
    patched: Run
    oracle: Run | None
    """None for the dense model itself."""


@dataclass
class Variant:
    """The dense model (no `parts`) or a method."""

    parts: Parts
    rounds: list[Round] = field(default_factory=list)
    per_layer: list[int] = field(default_factory=list)
    """Visual tokens of a prompt that enter each layer."""
    cuts: list[tuple[int, int]] = field(default_factory=list)
    """First layers that see fewer visual tokens, and how many."""
    entries: list[int] = field(default_factory=list)
    """What a step attends to in each layer's cache after the prefill."""
    visual_tokens: int = 0
    text_tokens: int = 0
    pictures: list[tuple[int, int]] = field(default_factory=list)
    """Rows and columns of what the encoder sees of a prompt."""
    unread_layers: int = 0
    """Layers at the end of the vision encoder that do not run."""
    shortened: list[Shortened | None] | None = None
    """How rows of each picture leave in the encoder."""
    thinned: Mapping[int, Thinned] = field(default_factory=dict)
    """By decoder layer, what is left out of it beside tokens."""
    at_most: bool = False
    """Whether the counts are those that an adaptive rule may not exceed."""
    cache_bytes: int = 0
    peak_memory_bytes: int | None = None
    """What prefill and decoding add, at their peak, to the loaded model."""

    @property
    def name(self) -> str:
        return parts_text(self.parts)

    @property
    def calls(self) -> list[MethodCall]:
        return [part.call for part in self.parts]

    @property
    def in_encoder(self) -> bool:
        """Whether rows leave inside the vision encoder."""
        return any(call.method.place is Place.ENCODER for call in self.calls)

    @property
    def place(self) -> Place | None:
        """Where it acts, the deepest place counting; None: dense."""
        places = [place for part in self.parts for place in part.call.method.places]
        return max(places, key=list(Place).index, default=None)

    def patched(
        self, model: PreTrainedModel, clip: ClipText | None = None
    ) -> AbstractContextManager[Handle | None]:
        """The model as this variant has it, inside the block."""
        if not self.parts:
            return nullcontext()
        return patch(model, self.calls, clip=clip)

    def reckon(self, subject: Subject) -> None:
        """Counts and bytes from sizes alone.

        Raises:
            BudgetError: the budget cannot be reached.
        """
        model = subject.model("meta")
        family, inputs = family_of(model), subject.inputs("meta")
        config: Any = family.text_model.config
        calls = self.calls
        model_shape = family.shape
        self.pictures = list(family.pictures(family.call(IMAGE, inputs))[0])
        self.visual_tokens = visual_tokens_of(model, inputs)
        with self.patched(model, subject.text_twin("meta", self.parts)) as handle:
            self.unread_layers = 0 if handle is None else handle.unread_layers
        self.shortened = reckoned(calls, self.pictures, self.visual_tokens, model_shape)
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
        self.thinned = thinned_layers(calls, model_shape)
        self.entries = [
            min(n + text, _storable(config, layer), n + text if most is None else most)
            for layer, n in enumerate(self.per_layer)
        ]
        widths = map(_stored_width, family.text_model.layers)
        numbers = sum(n * width for n, width in zip(self.entries, widths, strict=True))
        self.cache_bytes = numbers * getattr(torch, subject.dtype).itemsize * subject.batch_size

    def as_json(self, cost: ModelCost) -> dict[str, Any]:
        flops = cost.sample(
            pictures=self.pictures,
            visual_per_layer=self.per_layer,
            text_tokens=self.text_tokens,
            unread_layers=self.unread_layers,
            shortened=self.shortened,
            thinned=self.thinned,
        )
        mine = [one.patched for one in self.rounds]
        oracle = [one.oracle for one in self.rounds if one.oracle is not None]
        place = self.place
        return {
            "name": self.name,
            "methods": [method_record(part) for part in self.parts],
            "place": None if place is None else place.value,
            "kept": self.per_layer[-1],
            "at_most": self.at_most,
            "average_per_layer": fmean(self.per_layer),
            "average_after_cuts": fmean(after_cuts(self.per_layer)),
            "first_token_flops": flops.first_token,
            "flops": {
                "vision": flops.vision,
                "projector": flops.projector,
                "prefill": flops.prefill,
                "lm_head": flops.lm_head,
                "per_decoded_token": cost.decode(self.entries, 2, self.thinned),
            },
            "visual_share": visual_share(self.per_layer, self.visual_tokens, cost.decoder),
            "cache_bytes": self.cache_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "joules": {
                "first_token": spread([r.joules for r in mine if r.joules is not None]),
                "per_decoded_token": spread(
                    [
                        r.joules_per_decoded_token
                        for r in mine
                        if r.joules_per_decoded_token is not None
                    ]
                ),
            },
            "shares": {
                "vision": spread([r.vision / r.total for r in mine]),
                "select": spread([r.select / r.total for r in mine if self.parts]),
                "rest": spread([r.rest / r.total for r in mine]),
            },
            "seconds": {
                "total": spread([r.total for r in mine]),
                "vision": spread([r.vision for r in mine]),
                "select": spread([r.select for r in mine]),
                "rest": spread([r.rest for r in mine]),
                "per_decoded_token": spread(_decoding(mine)),
                "oracle_total": spread([r.total for r in oracle]),
                "oracle_vision": spread([r.vision for r in oracle]),
                "oracle_per_decoded_token": spread(_decoding(oracle)),
            },
            "ratios": {name: spread(values) for name, values in self._ratios().items()},
        }

    def _ratios(self) -> dict[str, list[float]]:
        """Each of two runs of the same round."""
        both = [(one.patched, one.oracle) for one in self.rounds if one.oracle is not None]
        pruned = [one for one in self.rounds if one.oracle is not None]
        steps = [(r.patched.per_decoded_token, r.dense.per_decoded_token) for r in self.rounds]
        vision = [p.vision / o.vision for p, o in both]
        against = [(p.per_decoded_token, o.per_decoded_token) for p, o in both]
        return {
            "speed_up": [one.dense.total / one.patched.total for one in self.rounds],
            "decode_speed_up": [dense / own for own, dense in steps if own and dense],
            "total_over_oracle": [p.total / o.total for p, o in both],
            "rest_over_oracle": [p.rest / o.rest for p, o in both],
            "decode_over_oracle": [own / least for own, least in against if own and least],
            "vision_over_plain": [] if self.in_encoder else vision,
            "select_over_dense_prefill": []
            if self.in_encoder
            else [r.patched.select / r.dense.rest for r in pruned],
        } | ({"vision_over_slicing": vision} if self.in_encoder else {})


def _storable(config: Any, layer: int) -> int:
    """The most entries that a decoder layer stores behind a prompt: of a window, all that the next
    token sees but itself; where it keeps a state instead, none."""
    kind = layer_kind(config, layer)
    if kind in STATES:
        return 0
    return sys.maxsize if kind == "full_attention" else int(config.sliding_window) - 1


def _stored_width(layer: Any) -> int:
    """Numbers that a decoder layer stores of a token: none where it keeps a state instead, or reads
    what an earlier layer stored."""
    keys = getattr(getattr(layer, "self_attn", None), "k_proj", None)
    return 0 if keys is None else 2 * int(keys.out_features)


def _decoding(runs: list[Run]) -> list[float]:
    return [run.per_decoded_token for run in runs if run.per_decoded_token is not None]
