"""`vlmprune bench scale`: how time and memory of choosing grow with the number of visual tokens.

Methods before the LLM are given queries and keys of encoder layers, features and so on as a model
has them after its encoder, of one grid of N tokens or of a video of small frames. Methods in the
decoder and on the cache run in a small LLaVA of one grid, where the time of choosing holds the
reading of scores, and memory is that of the whole prefill. All numbers are random but fixed.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from ...adapters.signals.draw import Sizes
from ...adapters.signals.encoder import pixel_seed
from ...adapters.signals.table import ENCODER_ATTENTION, SOURCES, shown
from ...prune.contract import (
    BeforeLLM,
    Decoder,
    LayerSignal,
    ModelShape,
    PixelSeed,
    Signal,
    Tower,
    VisualTokens,
)
from ...prune.registry import method_class
from ...prune.select import select
from ...prune.tiling import Block, Tiling
from ..measure.memory import MemoryMeasureError, added_at_peak, in_fresh_process
from ..results.statistics import spread
from ..words.parts import parse
from .rounds import peak_memory, prefill
from .subject import Subject
from .variant import Variant

logger = logging.getLogger(__name__)

Layout = Literal["grid", "frames", "decoder"]
FRAME = 16  # rows and columns of a frame
SHARE = 9  # one token of so many stays
_HEADS, _HEAD_WIDTH, WIDTH, _CLIP_WIDTH, _TEXT_TOKENS = 16, 64, 1024, 768, 40
FIT_FROM = 1024  # below, what does not depend on the number of tokens counts most
LONG = 3.0  # a round of so many seconds is neither warmed up for nor repeated
_LEAST_BYTES = 2**20  # below, the allocator says more than the method
LAYERS, DECODER_WIDTH = 6, 128
_SIZES = Sizes(
    width=WIDTH,
    encoder=_HEADS * _HEAD_WIDTH,
    clip=_CLIP_WIDTH,
    text=_TEXT_TOKENS,
    segments=1,
)
_FIELDS = {"token_select": ":n_init=4:n_local=32"}  # as published it does nothing to short prompts
_SHAPE = ModelShape(
    tower=Tower(num_layers=24, has_cls=True, text_twin=True),
    decoder=Decoder(num_layers=32, hidden_size=WIDTH, intermediate_size=4 * WIDTH),
)


# --- Measuring ---------------------------------------------------------------------------------


def measured(
    name: str,
    layout: Layout,
    count: int,
    rounds: int,
    limit: float,
    before: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Seconds and bytes at one size; what would take too long, by the size before, is left out."""
    last = before[-1] if before else None
    if last is not None:
        expected = math.inf
        if last["elapsed"] is not None:
            expected = last["elapsed"] * (count / last["tokens"]) ** 2
        if expected > limit:
            return {"tokens": count, "seconds": None, "peak_bytes": None, "elapsed": None}
    seconds = _decoder_seconds if layout == "decoder" else _seconds
    found, elapsed = seconds(name, layout, count, rounds)
    peak: int | None = None
    try:
        if count >= FIT_FROM:
            peak = in_fresh_process(peak_bytes, name, layout, count, torch.get_num_threads())
    except MemoryMeasureError as error:  # the times are there
        logger.warning("%s, %d tokens: %s", name, count, error)
    return {"tokens": count, "seconds": spread(found), "peak_bytes": peak, "elapsed": elapsed}


@torch.inference_mode()
def _seconds(name: str, layout: Layout, count: int, rounds: int) -> tuple[list[float], float]:
    """Of reading the scores and choosing; and what a round takes."""
    choice = Choice.random(name, layout, count)

    def once() -> float:
        started = time.perf_counter()
        choice.make()
        return time.perf_counter() - started

    return _repeated(once, rounds)


@torch.inference_mode()
def _decoder_seconds(
    name: str, layout: Layout, count: int, rounds: int
) -> tuple[list[float], float]:
    """Of choosing in the decoder, reading included; and what a round takes."""
    subject, variant = _in_decoder(name, count)
    model, inputs = subject.model("cpu"), subject.inputs("cpu")
    with variant.patched(model) as handle:
        assert handle is not None  # noqa: S101  (for the types)

        def once() -> float:
            prefill(model, inputs)
            return handle.last.select_seconds

        return _repeated(once, rounds)


def _repeated(once: Callable[[], float], rounds: int) -> tuple[list[float], float]:
    """The seconds of each round after one that warms up, or of that one alone if it takes long;
    and what a round takes in all."""
    found: list[float] = []
    elapsed = 0.0
    while len(found) <= rounds and elapsed < LONG:
        started = time.perf_counter()
        found.append(once())
        elapsed = time.perf_counter() - started
    return found[1:] or found, elapsed


@torch.inference_mode()
def peak_bytes(name: str, layout: Layout, count: int, threads: int) -> int:
    """What choosing adds at its peak (in the decoder: the patched prefill and one step), in a
    process of its own."""
    if layout == "decoder":
        subject, variant = _in_decoder(name, count)
        return peak_memory(subject, variant.parts, 1, threads)
    torch.set_num_threads(threads)
    return added_at_peak(Choice.random(name, layout, count).make)


def _in_decoder(name: str, count: int) -> tuple[Subject, Variant]:
    subject = Subject(layers=LAYERS, width=DECODER_WIDTH, visual_tokens=count)
    return subject, Variant(parse(f"{name}{_FIELDS.get(name, '')}@{1 / SHARE}"))


@dataclass(frozen=True)
class Choice:
    """One choice before the LLM, with what is read for it."""

    method: BeforeLLM
    tiling: Tiling
    read: Mapping[Signal, Callable[[], Tensor]]

    @classmethod
    def random(cls, name: str, layout: Layout, count: int) -> Choice:
        """Random tensors of one picture, the same in every run."""
        method = method_class(name)()
        assert isinstance(method, BeforeLLM)  # noqa: S101  (for the types)
        side = math.isqrt(count) if layout == "grid" else FRAME
        tiles = count // side**2
        draw = torch.Generator().manual_seed(0)
        needs = [need for need in method.needs(_SHAPE) if not isinstance(need, LayerSignal)]
        return cls(
            method=method,
            tiling=Tiling((Block((side,), (side,)),) * tiles),
            read={need: _reading(need, tiles, side**2, draw) for need in needs},
        )

    def make(self) -> None:
        count = self.tiling.num_tokens
        signals = {need: read() for need, read in self.read.items()}
        tokens = VisualTokens(num_tokens=count, tiling=self.tiling, shape=_SHAPE, signals=signals)
        select(self.method, tokens, count // SHARE)


def _reading(need: Signal, tiles: int, patches: int, draw: torch.Generator) -> Callable[[], Tensor]:
    """What gives a signal of T tiles of P patches, once called."""

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw)

    if shown(need) == ENCODER_ATTENTION:
        read = SOURCES[type(need)].read
        query, key = (normal(tiles, _HEADS, patches + 1, _HEAD_WIDTH) for _ in range(2))
        return lambda: read(need, query, key, _HEAD_WIDTH**-0.5, None)[:, 1:].flatten(0, 1)
    if isinstance(need, PixelSeed):
        pixels = normal(3)
        return lambda: pixel_seed(pixels)
    count = tiles if need.per == "tile" else tiles * patches
    made = SOURCES[type(need)].draw(need, count, _SIZES, draw)
    return lambda: made


# --- The fit -----------------------------------------------------------------------------------


class Fit(TypedDict):
    """The best `value = c * N ** exponent`, and how much of the spread of the logarithms it
    explains (1: all of it; None for two points, which every line meets)."""

    exponent: float
    r_squared: float | None


def fits(sizes: Sequence[Mapping[str, Any]]) -> dict[str, Fit | None]:
    """Of time and of memory."""
    times = [(s["tokens"], s["seconds"]["median"]) for s in sizes if s["seconds"]]
    peaks = [(s["tokens"], s["peak_bytes"]) for s in sizes if s["peak_bytes"] is not None]
    return {"time": fit(times, least=0.0), "memory": fit(peaks, least=_LEAST_BYTES)}


def fit(points: Sequence[tuple[int, float]], least: float) -> Fit | None:
    """Least squares of the logarithms over the points from 1024 tokens on, whose values are above
    `least`; None for fewer than two of them."""
    logs = [
        (math.log(tokens), math.log(value))
        for tokens, value in points
        if tokens >= FIT_FROM and value > least
    ]
    if len(logs) < 2:
        return None
    x, y = (list(axis) for axis in zip(*logs, strict=True))
    slope, intercept = statistics.linear_regression(x, y)
    r_squared = None
    if len(logs) > 2:
        middle = statistics.fmean(y)
        left = sum((b - slope * a - intercept) ** 2 for a, b in logs)
        around = sum((b - middle) ** 2 for b in y)
        r_squared = 1 - left / around if around else 1.0
    return Fit(exponent=slope, r_squared=r_squared)
