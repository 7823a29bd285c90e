"""The words that methods and adapters share: what a method declares, is given and returns.

Letters for shapes, the same in the whole code base: B batch, N visual tokens of one image, K kept
tokens, T text tokens, L sequence, C width of the vision encoder, D width of the LLM, H heads.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .errors import MethodFieldError
from .tiling import Tiling

Positions = Literal["original", "repacked"]
Newlines = Literal["drop", "keep", "compete"]
"""What becomes of newline tokens: all dropped (unless the budget has room for them after all
patches), all kept and counted, or candidates like any other token."""
Per = Literal["token", "tile", "image"]
"""What the first dimension of a signal counts."""
Scope = Literal["tile", "image"]
"""Whether a method chooses within each tile, whose shares of the budget follow its size, or among
all tokens of the image at once."""


class Place(enum.Enum):
    """Where a method removes tokens."""

    BEFORE_LLM = "before the LLM"
    DECODER = "in the LLM decoder"


# --- What a model looks like to a method -----------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Tower:
    """Properties of a vision encoder that rules may depend on (never its name).

    `full_attention` lists the layers whose attention is not windowed; `merge_unit` is the number
    of encoder patches behind one visual token (4 for the 2 x 2 mergers of Qwen, else 1);
    `text_twin` tells whether the encoder was trained with a text encoder of the same space (CLIP).
    """

    num_layers: int
    has_cls: bool
    merge_unit: int = 1
    full_attention: tuple[int, ...] | None = None
    text_twin: bool = False


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

    def lacks(self, signal: Signal) -> bool:
        """Whether the model's encoder has no such signal."""
        return (signal.of_cls and not self.tower.has_cls) or (
            signal.of_text_twin and not self.tower.text_twin
        )


# --- What a method may ask to see ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Signal:
    """A tensor that adapters capture because a method declares it.

    Its first dimension counts tokens, tiles, or (`per = "image"`) whatever its docstring says.
    """

    per: ClassVar[Per] = "token"
    of_cls: ClassVar[bool] = False
    """Needs an encoder with a CLS token."""
    of_text_twin: ClassVar[bool] = False
    """Needs the text encoder that the vision encoder was trained with."""


@dataclass(frozen=True, slots=True)
class Features(Signal):
    """Visual tokens as the LLM would see them, after the projector: (N, D)."""


@dataclass(frozen=True, slots=True)
class EncoderFeatures(Signal):
    """What the projector reads for each token: (N, C); patches that it merges are concatenated."""


@dataclass(frozen=True, slots=True)
class ClsFeatures(Signal):
    """The CLS token beside `EncoderFeatures`, one per tile: (tiles, C)."""

    per: ClassVar[Per] = "tile"
    of_cls: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClsAttention(Signal):
    """Attention of the CLS query to each token in ViT layer `layer`, averaged over heads: (N,).

    The softmax runs over all keys, CLS included; the CLS column is then dropped unnormalised.
    """

    layer: int
    of_cls: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClsLogits(Signal):
    """`ClsAttention` before the softmax: scaled q k^T, averaged over heads: (N,)."""

    layer: int
    of_cls: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClsAttentionOneHead(Signal):
    """`ClsAttention` with the heads of q and k taken as one head of full width, scaled by its
    square root: (N,)."""

    layer: int
    of_cls: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class AttentionToCls(Signal):
    """Attention that each token gives to CLS in ViT layer `layer`, averaged over heads: (N,)."""

    layer: int
    of_cls: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ReceivedAttention(Signal):
    """Attention that each token receives in ViT layer `layer`: (N,), about 1 on average.

    Head mean, *summed* over all query rows (CLS row included), averaged over the patches behind a
    token.
    """

    layer: int


@dataclass(frozen=True, slots=True)
class Keys(Signal):
    """Keys of ViT layer `layer` as its attention uses them: (N, H, D_head), averaged over the
    patches behind a token."""

    layer: int


@dataclass(frozen=True, slots=True)
class ClipImage(Signal):
    """Each token in the space that CLIP shares with text, not normalised: (N, D_clip)."""

    of_text_twin: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClipText(Signal):
    """The question in the space that CLIP shares with images, one row per segment of the text
    encoder's length: (segments, D_clip)."""

    per: ClassVar[Per] = "image"
    of_text_twin: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class TextEmbeddings(Signal):
    """Input embeddings of the text that belongs to the image: (T, D).

    That is the text after it, up to the next image; the text before it where none follows.
    """

    per: ClassVar[Per] = "image"


@dataclass(frozen=True, slots=True)
class PixelSeed(Signal):
    """An integer that depends on the image's pixels alone, on no batch mate: a 0-d int64 tensor."""

    per: ClassVar[Per] = "image"


@dataclass(frozen=True, slots=True)
class LastRowAttention(Signal):
    """Attention of the prompt's last token to each visual token alive in decoder layer `layer`,
    softmax over all keys, averaged over heads: (N,)."""

    layer: int


# --- What a method is given, and what it returns ---------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualTokens:
    """The tokens a method chooses from, and what it declared to see of them.

    Before the LLM: the patches of one tile or of a whole image, as the method's scope says.
    Newlines are among them only where they compete. Signals per token have `num_tokens` rows,
    those per tile one row for each of `tiling.tiles`.
    In the decoder: the N tokens of an image that are still alive, newlines included; `tiling` stays
    the image's own and `alive` holds their original numbers (N,), ascending.
    """

    num_tokens: int
    tiling: Tiling
    shape: ModelShape
    signals: Mapping[Signal, Tensor]
    alive: Tensor | None = None
    tile: int = 0
    """Number of the image's tile that these tokens are, where the scope is one tile."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the one tile that these tokens are."""
        (tile,) = self.tiling.tiles
        return tile.rows, tile.columns

    @property
    def device(self) -> torch.device:
        """Where the signals are; the CPU where there are none."""
        return next((t.device for t in self.signals.values()), torch.device("cpu"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What survives of the tokens given, and how it enters the LLM.

    `kept` alone means: these tokens, as they are, in their order. Methods that merge, reorder or
    add rows say more. The number of rows that enter is that of `order`, or else of `kept`.
    """

    kept: Tensor
    """int64, ascending, unique numbers of the tokens that are kept or stand for a merged group."""
    order: Tensor | None = None
    """(K,) int64: the rows in the order in which the LLM sees them, a permutation of `kept` with
    -1 for rows that stand for no token (CLS, aggregates). None: as `kept`."""
    features: Tensor | None = None
    """(R, C) or (R, D): what enters in place of the tokens' own features."""
    rows: Tensor | None = None
    """(R,) int64: which rows `features` holds. None: all K, in order."""
    projected: bool = False
    """Whether `features` are LLM features (R, D) rather than encoder features (R, C), which pass
    the projector afterwards."""
    groups: Tensor | None = None
    """(2, G) int64 pairs: a row and a token that it was merged from, sorted by row."""

    @property
    def count(self) -> int:
        """K, rows that enter the LLM."""
        return len(self.kept if self.order is None else self.order)


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
    """Whether `patch` must be given a budget. False: without one the paper's own schedule holds,
    or its adaptive rule, which is `select_adaptive`."""

    def __post_init__(self) -> None:  # noqa: B027  (checks of fields, where there are any)
        """Refuse impossible fields. Overrides call `super().__post_init__()`."""

    @abstractmethod
    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        """The signals that `select` reads, with layers resolved for this model."""

    @abstractmethod
    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose exactly `keep` of `tokens.num_tokens` tokens, 1 <= keep < num_tokens."""

    def select_adaptive(self, tokens: VisualTokens) -> Selection:
        """Choose as many of the tokens as the paper's rule finds, where no budget is given."""
        raise NotImplementedError(f"{self.name} has no rule for its own number of tokens.")

    def most(self, num_tokens: int) -> int:
        """The largest number of tokens that `select_adaptive` may keep of `num_tokens`."""
        return num_tokens

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        """Where tokens are removed, in order of depth. Before the LLM: one cut at layer 0."""
        return (Cut(0),)

    def fields(self) -> dict[str, object]:
        """The method's own fields and their values, for result files."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class BeforeLLM(Method):
    """A method that chooses once per image, between the vision encoder and the LLM.

    `newlines` and `scope` override the first of the values that the method allows, which is its
    paper's.
    """

    place: ClassVar[Place] = Place.BEFORE_LLM
    newline_policies: ClassVar[tuple[Newlines, ...]] = ("drop", "keep")
    scopes: ClassVar[tuple[Scope, ...]] = ("tile",)

    newlines: Newlines | None = None
    scope: Scope | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, value, allowed in (
            ("newlines", self.newlines, self.newline_policies),
            ("scope", self.scope, self.scopes),
        ):
            if value is not None and value not in allowed:
                choice = " or ".join(map(repr, allowed))
                raise MethodFieldError(f"{field}={value!r} is not possible: use {choice}.")
        if self.newlines == "compete" and self.scope_used == "tile":
            raise MethodFieldError(
                "newlines='compete' is not possible with scope='tile', as newlines belong to no "
                "tile: use scope='image', or newlines='drop'."
            )

    @property
    def newline_policy(self) -> Newlines:
        """The user's, or the first allowed one; in the scope of a tile newlines cannot compete."""
        in_tile = self.scope_used == "tile"
        fitting = [p for p in self.newline_policies if not (in_tile and p == "compete")]
        return self.newlines or fitting[0]

    @property
    def scope_used(self) -> Scope:
        return self.scope or self.scopes[0]
