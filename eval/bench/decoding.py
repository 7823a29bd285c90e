"""Decoding behind a prefill, one random word after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...adapters.cache_names import CACHE, cache_of
from ...adapters.registry import family_of
from ...adapters.stopwatch import Stopwatch
from ..models.shapes import words


@dataclass
class Decoding:
    """A model, what its prefill gave, and the mask (B, L) of the prompt where something is
    padded."""

    model: PreTrainedModel
    output: Any
    mask: Tensor | None

    def step(self, word: Tensor) -> None:
        """Feed one word to every row."""
        batch_size = len(self.output.logits)
        places = {}
        if self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(batch_size, 1)], 1)
            if family_of(self.model).mrope:  # else the model makes those of all columns
                places["position_ids"] = self.mask.sum(1, keepdim=True) - 1
        self.model(
            input_ids=word.expand(batch_size, 1),
            attention_mask=self.mask,
            use_cache=True,
            logits_to_keep=1,
            **places,
            **{CACHE: cache_of(self.output)},
        )

    def run(self, new_tokens: int) -> None:
        """Feed `new_tokens` words."""
        for word in self.words(new_tokens):
            self.step(word)

    def words(self, count: int) -> Tensor:
        """Random words, the same in every run: (count,)."""
        return words(self.model.config, count, seed=1).to(self.output.logits.device)


def in_turn(models: Sequence[Decoding], new_tokens: int) -> list[list[float]]:
    """Seconds of each model's steps, one of each at a time: what slows the machine down for longer
    than a step slows all of them. They change places from step to step."""
    seconds: list[list[float]] = [[] for _ in models]
    places = range(len(models))
    for number, word in enumerate(models[0].words(new_tokens)):
        for place in places if number % 2 else reversed(places):
            stopwatch = Stopwatch(word.device)
            with stopwatch:
                models[place].step(word)
            seconds[place].append(stopwatch.seconds)
    return seconds
