"""Every signal of the decoder layers, and methods that write down what they are given and keep
pseudo-random tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from kit import zoo
from torch import Tensor
from vlmprune.adapters.patching import patch
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import (
    BeforeLLM,
    CacheEntries,
    Compressed,
    Compressing,
    Cut,
    GistAttention,
    Hidden,
    InDecoder,
    LayerKeys,
    LayerValues,
    MeanHidden,
    ModuleStep,
    Neurons,
    Place,
    ReceivedInLayer,
    RotaryAffinity,
    RotaryMeans,
    Rows,
    Selection,
    Signal,
    TextAttention,
    TextHidden,
    TextKeys,
    TextValues,
    VisualTokens,
)
from vlmprune.prune.declared import readable

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
DEPTH = 4
LAYERS = range(DEPTH)
FIRST = 0.8
TWICE = (Cut(Place.DECODER, 1, 2.0), Cut(Place.DECODER, 3))
THREE: zoo.Row = (2, "A", 3, "B", 1, "C", 4)
NO_TEXT_BEHIND: zoo.Row = (3, "C", "A")
ROWS = (THREE, zoo.ONE, NO_TEXT_BEHIND, zoo.NONE)

# --- What is declared --------------------------------------------------------------------------


def related(visual: Tensor, text: Tensor) -> Tensor:
    """The text tokens that are more like the image than their mean; some always are."""
    likeness = text @ visual.mean(0)
    return likeness >= likeness.mean()


def step(before: Tensor, after: Tensor) -> Tensor:
    """Depends on all tokens of the prompt."""
    return after.norm(dim=-1) / before.norm(dim=-1) * (before * after).sum(-1).softmax(0)


def likeness(visual: Tensor, text: Tensor) -> Tensor:
    return visual @ text.mean(0)


RULES: tuple[Rows, ...] = ("last", "text", related)


def declared(layers: Sequence[int] = LAYERS) -> tuple[Signal, ...]:
    """Every signal of the layers."""
    found: list[Signal] = []
    for n in layers:
        for rows in RULES:
            for each in (False, True):
                found += [TextAttention(n, rows, ahead, each) for ahead in (False, True)]
            found.append(RotaryAffinity(n, rows))
        found += [TextAttention(n, rows, heads="max") for rows in ("text", "image")]
        found += [TextAttention(n, "image"), TextAttention(n, "image", ahead=True, heads="max")]
        found += [Hidden(n, normed) for normed in (False, True)]
        found += [TextHidden(n, normed) for normed in (False, True)]
        found += [LayerKeys(n), TextKeys(n), LayerValues(n), RotaryMeans(n)]
        found += [LayerKeys(n, ahead=True), GistAttention(n)]
        found += [TextValues(n, part) for part in ("behind", "all")]
        found += [ReceivedInLayer(n), MeanHidden(n, "query"), MeanHidden(n, "context")]
        found += [ModuleStep(n, "attention", step), ModuleStep(n, "mlp", step)]
        found.append(Neurons(n, likeness))
    return tuple(found)


def before_a_cut(signal: Signal) -> bool:
    """Whether the cut of a layer sees this signal of the layer itself."""
    return getattr(signal, "ahead", False) or isinstance(signal, Hidden | TextHidden | MeanHidden)


def ran(wants: Sequence[Signal], cuts: Sequence[int], layer: int) -> set[Signal]:
    """Those that the cut at `layer` sees."""
    return {
        want
        for want in wants
        if (want.layer < layer or (want.layer == layer and before_a_cut(want)))
        and (want.layer in cuts or not getattr(want, "ahead", False))
    }


# --- Methods that record -----------------------------------------------------------------------


def pick(layer: int, num_tokens: int, keep: int) -> Tensor:
    """Pseudo-random tokens, the same in every batch."""
    draw = torch.Generator().manual_seed(1000 * layer + num_tokens)
    return torch.randperm(num_tokens, generator=draw)[:keep].sort().values


@dataclass(frozen=True)
class Seen:
    """What a cut was given, and what it kept."""

    tokens: VisualTokens
    chosen: Tensor

    @property
    def kept(self) -> Tensor:
        """Numbers of the image's tokens."""
        alive = self.tokens.alive
        return self.chosen if alive is None else alive[self.chosen]


@dataclass(frozen=True, kw_only=True)
class Recorder(InDecoder):
    """Writes down what it is given."""

    name: ClassVar[str] = "recorder"
    wants: tuple[Signal, ...] = ()
    at: tuple[Cut, ...] = TWICE
    seen: list[Seen] = field(default_factory=list)

    def needs(self, shape):
        return tuple(
            want
            for want in self.wants
            if any(readable(want, cut) for cut in self.at) and not shape.lacks(want)
        )

    def cuts(self, shape):
        return self.at

    def select(self, tokens, keep):
        chosen = pick(tokens.layer, tokens.num_tokens, keep)
        self.seen.append(Seen(tokens, chosen))
        return Selection(kept=chosen)

    def of(self, layer: int) -> list[Seen]:
        """What its cut at a layer saw, image by image."""
        return [seen for seen in self.seen if seen.tokens.layer == layer]


@dataclass(frozen=True, kw_only=True)
class First(BeforeLLM):
    """Keeps pseudo-random tokens before the LLM, newlines among them."""

    name: ClassVar[str] = "first"
    scopes = ("image",)
    newline_policies = ("compete",)
    seen: list[Seen] = field(default_factory=list)

    needs, select = Recorder.needs, Recorder.select
    wants: ClassVar[tuple[Signal, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class CacheRecorder(Compressing):
    """Writes down entries, and keeps pseudo-random ones."""

    name: ClassVar[str] = "cache-recorder"
    wants: tuple[Signal, ...] = tuple(ReceivedInLayer(n) for n in LAYERS)
    seen: list[CacheEntries] = field(default_factory=list)

    def needs(self, shape):
        return tuple(want for want in self.wants if not shape.lacks(want))

    def compress(self, entries, keep):
        self.seen.append(entries)
        return Compressed(kept=pick(entries.layer, len(entries.visual), keep))


# --- Calls -------------------------------------------------------------------------------------


def call(method, keep: float = 0.3) -> MethodCall:
    return MethodCall(method=method, budget=Budget("keep_ratio", keep))


def calls_of(methods, keep: float = 0.3) -> list[MethodCall]:
    return [call(method, FIRST if isinstance(method, First) else keep) for method in methods]


def modes(case: zoo.Case) -> tuple[str, ...]:
    return ("original",) if case.fixed_positions else ("original", "repacked")


def run(case, attention, rows, *methods, positions="original", padding="left", keep=0.3):
    model = case.model(attention)
    handle = patch(model, calls_of(methods, keep), positions=positions)
    with torch.no_grad():
        model(**case.inputs(rows, padding))
    return handle
