"""`vlmprune bench select`: the time of choosing, beside a plain transcription of official code.

Both sides start where a vision encoder of LLaVA's size (CLIP-L/336) has just run: queries and keys
of its layers, its output, the projected features, embeddings of the text. Both end with the tokens
that stay. They take turns in the same process; all inputs are random but fixed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ...adapters.signals.encoder import pixel_seed
from ...adapters.signals.table import ENCODER_ATTENTION, SOURCES, shown
from ...prune.contract import (
    BeforeLLM,
    ClipImage,
    ClipText,
    ClsFeatures,
    Decoder,
    EncoderFeatures,
    Features,
    LayerSignal,
    ModelShape,
    PixelSeed,
    Selection,
    Signal,
    TextEmbeddings,
    Tower,
    VisualTokens,
)
from ...prune.errors import MissingSignalError
from ...prune.select import select_all
from ...prune.tiling import Block, Tiling
from ..results.statistics import Spread, spread
from ..transcriptions import Transcription, find
from ..transcriptions.picture import SIDE, Picture, canvas

PATCHES = SIDE * SIDE
_HEADS, _HEAD_WIDTH, _LAYERS, _CLIP_WIDTH, _TEXT_TOKENS = 16, 64, 24, 768, 40
_LAYERS_READ = (0, 5, 8, *range(16, _LAYERS))
GRIDS = {1: (0, 0), 3: (1, 2), 4: (1, 3), 5: (2, 2)}
"""Tiles of an image -> rows and columns of crops besides the thumbnail."""


# --- What both sides are given ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A batch of images as a model holds it after its vision encoder; B images of T tiles."""

    pictures: tuple[Picture, ...]
    """The images one by one, as views of the tensors below."""
    queries: Mapping[int, Tensor]
    """By encoder layer: (B * T, H, S, D_head), CLS first."""
    keys: Mapping[int, Tensor]
    hidden: Tensor
    """(B * T, S, C)."""
    pixels: tuple[Tensor, ...]
    tiling: Tiling
    shape: ModelShape

    @classmethod
    def random(cls, *, tiles: int, images: int, width: int) -> Scene:
        """Random tensors, the same in every run."""
        generator = torch.Generator().manual_seed(0)
        grid = GRIDS[tiles]

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        heads = (images * tiles, _HEADS, PATCHES + 1, _HEAD_WIDTH)
        queries = {layer: normal(*heads) for layer in _LAYERS_READ}
        keys = {layer: normal(*heads) for layer in _LAYERS_READ}
        hidden = normal(images * tiles, PATCHES + 1, _HEADS * _HEAD_WIDTH)
        pictures = []
        for image in range(images):
            here = slice(image * tiles, (image + 1) * tiles)
            features = normal(tiles, PATCHES, width)
            pictures.append(
                Picture(
                    grid=grid,
                    queries={layer: query[here] for layer, query in queries.items()},
                    keys={layer: key[here] for layer, key in keys.items()},
                    hidden=hidden[here],
                    features=features,
                    packed=_in_order(features, grid),
                    clip_image=normal(tiles, PATCHES, _CLIP_WIDTH),
                    clip_text=normal(1, _CLIP_WIDTH),
                    text=normal(_TEXT_TOKENS, width),
                )
            )
        blocks = [Block((SIDE,), (SIDE,))]
        if tiles > 1:
            blocks.append(Block((SIDE,) * grid[0], (SIDE,) * grid[1]))
        return cls(
            pictures=tuple(pictures),
            queries=queries,
            keys=keys,
            hidden=hidden,
            pixels=tuple(normal(tiles, 3, SIDE * 14, SIDE * 14) for _ in pictures),
            tiling=Tiling(tuple(blocks)),
            shape=ModelShape(
                tower=Tower(num_layers=_LAYERS, has_cls=True, text_twin=True),
                decoder=Decoder(num_layers=32, hidden_size=width, intermediate_size=11008),
            ),
        )

    @property
    def tiles(self) -> int:
        return self.pictures[0].tiles

    @property
    def tokens(self) -> int:
        return self.tiles * PATCHES

    @property
    def keep(self) -> int:
        """The budgets of the literature: 192 of 576, and 128 a tile (640 of 2880)."""
        return 192 if self.tiles == 1 else 128 * self.tiles

    def signals(self, method: BeforeLLM) -> list[dict[Signal, Tensor]]:
        """Per image what `method` reads before the LLM, as the adapters read it."""
        needs = [need for need in method.needs(self.shape) if not isinstance(need, LayerSignal)]
        columns = {need: self._column(need) for need in needs}
        return [{n: columns[n][i] for n in columns} for i in range(len(self.pictures))]

    def _column(self, need: Signal) -> Sequence[Tensor]:
        if shown(need) == ENCODER_ATTENTION:
            layer: int = need.layer  # type: ignore[attr-defined]
            read = SOURCES[type(need)].read
            heads = self.queries[layer], self.keys[layer]
            return self._per_image(read(need, *heads, _HEAD_WIDTH**-0.5, None))
        match need:
            case Features():
                return [picture.packed for picture in self.pictures]
            case EncoderFeatures():
                return self._per_image(self.hidden)
            case ClsFeatures():
                return self.hidden[:, 0].split(self.tiles)
            case ClipImage():
                return [_in_order(picture.clip_image, picture.grid) for picture in self.pictures]
            case ClipText():
                return [picture.clip_text for picture in self.pictures]
            case TextEmbeddings():
                return [picture.text for picture in self.pictures]
            case PixelSeed():
                return [pixel_seed(pixels) for pixels in self.pixels]
        raise MissingSignalError(f"`vlmprune bench select` makes no {need}.")

    def _per_image(self, values: Tensor) -> list[Tensor]:
        """(B * T, S, ...) -> (N, ...) per image, without CLS, in the order of the tokens."""
        images = values[:, 1:].split(self.tiles)
        return [_in_order(v, p.grid) for v, p in zip(images, self.pictures, strict=True)]


def _in_order(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """(T, P, ...) -> (N, ...): the thumbnail, then the canvas row by row."""
    if len(values) == 1:
        return values[0]
    return torch.cat([values[0], canvas(values[1:], grid).flatten(0, 1)])


# --- Measuring --------------------------------------------------------------------------------


@dataclass
class Side:
    """Seconds of one side, for the whole batch, round by round."""

    maps: list[float] = field(default_factory=list)
    """Making attention maps, which official code gets as a by-product of the encoder."""
    read: list[float] = field(default_factory=list)
    choose: list[float] = field(default_factory=list)

    @property
    def own(self) -> list[float]:
        return [r + c for r, c in zip(self.read, self.choose, strict=True)]

    @property
    def total(self) -> list[float]:
        return [m + o for m, o in zip(self.maps, self.own, strict=True)]

    def add(self, maps: float, read: float, choose: float) -> None:
        self.maps.append(maps)
        self.read.append(read)
        self.choose.append(choose)

    def as_json(self) -> dict[str, Spread | None]:
        parts = {"maps": self.maps, "read": self.read, "choose": self.choose, "total": self.total}
        return {part: spread(seconds) for part, seconds in parts.items()}


@dataclass
class Row:
    """One method on one scene; `plain` is None where there is nothing to compare with."""

    method: BeforeLLM
    tokens: int
    batch: int
    kept: int
    ours: Side
    plain: Side | None

    def as_json(self) -> dict[str, Any]:
        plain = self.plain
        return {
            "method": self.method.name,
            "fields": self.method.fields(),
            "tokens": self.tokens,
            "batch": self.batch,
            "kept": self.kept,
            "seconds": {
                "ours": self.ours.as_json(),
                "plain": plain.as_json() if plain else None,
            },
            "plain_over_ours": self._ratio(plain.total) if plain else None,
            "plain_over_ours_without_maps": self._ratio(plain.own) if plain else None,
        }

    def _ratio(self, plain: Sequence[float]) -> Spread | None:
        return spread([p / o for p, o in zip(plain, self.ours.total, strict=True)])


@torch.inference_mode()
def compare(
    scene: Scene,
    methods: Sequence[BeforeLLM],
    rounds: int,
    advance: Callable[[], None] = lambda: None,
) -> list[Row]:
    """Every round runs every method, ours and then the plain one; the first, which warms up, is
    thrown away."""
    plains = [find(method.name, tiles=scene.tiles) for method in methods]
    rows = [
        Row(method, scene.tokens, len(scene.pictures), scene.keep, Side(), Side() if p else None)
        for method, p in zip(methods, plains, strict=True)
    ]
    for number in range(rounds + 1):
        for row, plain in zip(rows, plains, strict=True):
            ours = time_ours(scene, row.method, plain)
            theirs = time_plainly(scene, plain) if plain else None
            advance()
            if number == 0:
                continue
            row.ours.add(0.0, *ours)
            if row.plain is not None and theirs is not None:
                row.plain.add(*theirs)
    return rows


def time_ours(scene: Scene, method: BeforeLLM, plain: Transcription | None) -> tuple[float, float]:
    """Seconds of reading the scores of the batch, and of choosing by them."""
    start = time.perf_counter()
    signals = scene.signals(method)
    middle = time.perf_counter()
    for picture, chosen in zip(scene.pictures, choose(scene, method, signals), strict=True):
        if plain and plain.moves_rows and chosen.features is None:  # what the official step does
            picture.packed[chosen.kept if chosen.order is None else chosen.order]
    return middle - start, time.perf_counter() - middle


def choose(
    scene: Scene, method: BeforeLLM, signals: Sequence[Mapping[Signal, Tensor]]
) -> list[Selection]:
    """The selection for every image, in one pass."""
    images = [
        VisualTokens(num_tokens=scene.tokens, tiling=scene.tiling, shape=scene.shape, signals=seen)
        for seen in signals
    ]
    return select_all(method, images, [scene.keep] * len(images))


def time_plainly(scene: Scene, plain: Transcription) -> tuple[float, float, float]:
    """Seconds of making attention maps, reading scores and choosing, image by image."""
    seconds = [0.0, 0.0, 0.0]
    for picture in scene.pictures:
        stamps = [time.perf_counter()]
        maps = [picture.attention(layer) for layer in plain.maps]
        stamps.append(time.perf_counter())
        scores = plain.read(picture, *maps)
        stamps.append(time.perf_counter())
        plain.choose(picture, scores, scene.keep)
        stamps.append(time.perf_counter())
        seconds = [s + b - a for s, (a, b) in zip(seconds, pairwise(stamps), strict=True)]
    return seconds[0], seconds[1], seconds[2]
