"""The words that methods and adapters share: what a method declares, is given and returns.

Letters for shapes, the same in the whole code base: B batch, N visual tokens of one image, K kept
tokens, T text tokens, L sequence, D width, H heads.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from torch import Tensor

Positions = Literal["original", "repacked"]


class Place(enum.Enum):
    """Where a method removes tokens."""

    BEFORE_LLM = "before the LLM"
    DECODER = "in the LLM decoder"


# --- What a model looks like to a method -----------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """Properties of a vision encoder that rules may depend on (never its name).

    `full_attention` lists the layers whose attention is not windowed; `merge_unit` is the number
    of encoder patches behind one visual token (4 for the 2 x 2 mergers of Qwen, else 1).
    """

    num_layers: int
    has_cls: bool
    merge_unit: int = 1
    full_attention: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Sizes of the LLM decoder: layers, width `hidden_size` and MLP width `intermediate_size`."""

    num_layers: int
    hidden_size: int
    intermediate_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes that turn a method's fields into layers and counts, without any tensor."""

    tower: Tower
    decoder: Decoder


# --- What a method may ask to see ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Features:
    """Visual tokens as the LLM would see them, after the projector: (N, D)."""


@dataclass(frozen=True, slots=True)
class ClsAttention:
    """Attention of the CLS query to each token in ViT layer `layer`, averaged over heads: (N,).

    The softmax runs over all keys, CLS included; the CLS column is then dropped unnormalised.
    """

    layer: int


@dataclass(frozen=True, slots=True)
class ReceivedAttention:
    """Attention that each token receives in ViT layer `layer`: (N,), about 1 on average.

    Head mean, *summed* over all query rows (CLS row included), averaged over the patches behind a
    token.
    """

    layer: int


@dataclass(frozen=True, slots=True)
class LastRowAttention:
    """Attention of the prompt's last token to each visual token alive in decoder layer `layer`,
    softmax over all keys, averaged over heads: (N,)."""

    layer: int


@dataclass(frozen=True, slots=True)
class PixelSeed:
    """An integer that depends on the image's pixels alone, on no batch mate: a 0-d int64 tensor."""


Signal = Features | ClsAttention | ReceivedAttention | LastRowAttention | PixelSeed


# --- What a method is given, and what it returns ---------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualTokens:
    """One image as a method sees it: N tokens on a `grid` (rows, columns) in raster order.

    In the decoder only the tokens still alive are given, `grid` stays the image's own, and
    `alive` holds their original indices (N,), ascending.
    """

    num_tokens: int
    grid: tuple[int, int]
    shape: ModelShape
    signals: Mapping[Signal, Tensor]
    alive: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What survives: `kept` (K,) int64, ascending, unique indices into the tokens given."""

    kept: Tensor


@dataclass(frozen=True, slots=True)
class Cut:
    """One removal: decoder layer `layer` is the first to see fewer tokens (0: before the LLM).

    `share` is the count after this cut relative to the count after the method's last cut, so that
    a schedule keeps its proportions under any budget.
    """

    layer: int
    share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to choose visual tokens. Subclasses are frozen dataclasses, one file each.

    Fields are the paper's hyper-parameters. `select` is pure: the same tensors give the same
    selection on every device, in every batch arrangement, and ties go to the lower index.
    """

    name: ClassVar[str]
    place: ClassVar[Place]
    positions: ClassVar[Positions] = "repacked"
    """Default of the paper for the positions of the tokens that follow a cut."""
    needs_budget: ClassVar[bool] = True
    """Whether `patch` must be given a budget (False: the paper's own schedule is the default)."""

    @abstractmethod
    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        """The signals that `select` reads, with layers resolved for this model."""

    @abstractmethod
    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose exactly `keep` of `tokens.num_tokens` tokens, 1 <= keep < num_tokens."""

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        """Where tokens are removed, in order of depth. Before the LLM: one cut at layer 0."""
        return (Cut(0),)

    def fields(self) -> dict[str, object]:
        """The method's own fields and their values, for result files."""
        return {f.name: getattr(self, f.name) for f in fields(self)}
