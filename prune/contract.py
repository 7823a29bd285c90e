"""The words that methods and adapters share: what a method declares, is given and returns.

Letters for shapes, the same in the whole code base: B batch, N visual tokens of one image, K kept
tokens, T text tokens, L sequence, C width of the vision encoder, D width of the LLM, H heads.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .errors import MethodFieldError
from .numbers import plain
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


Images = Literal["each", "context", "query"]
"""Which images a cut is for: every one on its own; all but the prompt's last one, pooled, so that
the method chooses from all of them at once; the last one."""
RowRule = Callable[[Tensor, Tensor], Tensor]
"""Which text tokens are asked, at least one: (visual embeddings (N, D), text embeddings (T, D)) ->
(T,) bool."""
Rows = Literal["last", "text"] | RowRule
"""Rows of attention: the prompt's last token; the text tokens behind the image, up to the prompt's
end (its last token where there is no text); those of them that a rule picks, once per prompt, from
what entered the LLM."""


class Place(enum.Enum):
    """Where a method removes tokens."""

    BEFORE_LLM = "before the LLM"
    DECODER = "in the LLM decoder"
    CACHE = "in the KV cache"


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
    of_prompt: ClassVar[bool] = False
    """Differs from question to question about the same image."""
    of_rows: ClassVar[bool] = False
    """Rows that may enter the LLM merged: a method that merges sees them with their gradients."""


@dataclass(frozen=True, slots=True)
class Features(Signal):
    """Visual tokens as the LLM would see them, after the projector: (N, D)."""

    of_rows: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class EncoderFeatures(Signal):
    """What the projector reads for each token: (N, C); patches that it merges are concatenated."""

    of_rows: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class ClsFeatures(Signal):
    """The CLS token beside `EncoderFeatures`, one per tile: (tiles, C)."""

    per: ClassVar[Per] = "tile"
    of_cls: ClassVar[bool] = True
    of_rows: ClassVar[bool] = True


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
    of_prompt: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class TextEmbeddings(Signal):
    """Input embeddings of the text that belongs to the image: (T, D).

    That is the text after it, up to the next image; the text before it where none follows.
    """

    per: ClassVar[Per] = "image"
    of_prompt: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class PixelSeed(Signal):
    """An integer that depends on the image's pixels alone, on no batch mate: a 0-d int64 tensor."""

    per: ClassVar[Per] = "image"


# --- What a method inside the decoder or on its cache may ask to see ---------------------------


@dataclass(frozen=True, slots=True)
class LayerSignal(Signal):
    """A signal of decoder layer `layer`, for the tokens alive there: (N, ...).

    At a cut a method sees the signals of all layers that have run, for the tokens that are still
    alive. Values are float32 unless said otherwise.
    """

    layer: int


@dataclass(frozen=True, slots=True)
class TextAttention(LayerSignal):
    """Attention that text tokens give to each token: mean over `rows` and heads, (N,); with
    `each` one value per head and row, (N, H, R).

    The softmax is over all keys that a row sees. `ahead`: read where the layer is about to be cut,
    from the queries and keys that it would have for its uncut input.
    """

    rows: Rows = "last"
    ahead: bool = False
    each: bool = False


@dataclass(frozen=True, slots=True)
class RotaryAffinity(LayerSignal):
    """What rotary positions alone add to a score: the product of two vectors of ones, turned to the
    positions of a token and of a text token, over the root of the head's width: (N, R)."""

    rows: Rows = "last"


@dataclass(frozen=True, slots=True)
class ReceivedInLayer(LayerSignal):
    """Attention that each token receives from all rows of the prompt: head mean, summed over rows
    (causal, streamed): (N,)."""


@dataclass(frozen=True, slots=True)
class Hidden(LayerSignal):
    """Hidden states that enter the layer, before a cut of this layer: (N, D), the model's dtype."""

    of_rows: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class MeanHidden(LayerSignal):
    """Mean of the hidden states that enter the layer, over a part of the prompt: (D,).

    `query`: the prompt's last image and the text behind it. `context`: everything before that
    image, or all of the prompt's text where no other image is before it.
    """

    per: ClassVar[Per] = "image"
    of: Literal["query", "context"] = "query"


@dataclass(frozen=True, slots=True)
class ModuleStep(LayerSignal):
    """`read(input, output)` of the layer's attention or MLP, (L, D) each over the real tokens of a
    prompt, before the residual is added: (L,), of which the method sees its tokens' (N,)."""

    module: Literal["attention", "mlp"]
    read: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Neurons(LayerSignal):
    """`read(visual, text)` of the MLP's activations act(gate) * up, (N, M) of the tokens and (T, M)
    of the text behind the image (as for `Rows`): (N,)."""

    read: Callable[[Tensor, Tensor], Tensor]


# --- What a method is given, and what it returns ---------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class VisualTokens:
    """The tokens a method chooses from, and what it declared to see of them.

    Before the LLM: the patches of one tile or of a whole image, as the method's scope says.
    Newlines are among them only where they compete. Signals per token have `num_tokens` rows,
    those per tile one row for each of `tiling.tiles`.
    In the decoder (`layer` > 0, the first layer that will see fewer): the N tokens of an image that
    are still alive, newlines included; `tiling` stays the image's own and `alive` holds their
    original numbers (N,), -1 for rows that stand for no token. For a pooled cut the images follow
    one another.
    """

    num_tokens: int
    tiling: Tiling
    shape: ModelShape
    signals: Mapping[Signal, Tensor]
    alive: Tensor | None = None
    layer: int = 0
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
    """(R, C) or (R, D): what enters in place of the tokens' own features. In training the method
    is asked a second time for these, with gradients in its signals `of_rows`."""
    rows: Tensor | None = None
    """(R,) int64: which rows `features` holds. None: all K, in order."""
    projected: bool = False
    """Whether `features` are LLM features (R, D) rather than encoder features (R, C), which pass
    the projector afterwards."""
    groups: Tensor | None = None
    """(2, G) int64 pairs: a row and a token that it was merged from, sorted by row."""
    scores: Tensor | None = None
    """(N,) floating: the numbers by which the tokens given were ranked, high ones stay. For people
    to look at (`patch(..., record=True)`): nothing is chosen by them any more. A method sets what
    it has computed anyway; None: see `Method.unranked`."""

    @property
    def arranged(self) -> Tensor:
        """(K,) `order`, or `kept` where there is none."""
        return self.kept if self.order is None else self.order

    @property
    def count(self) -> int:
        """K, rows that enter the LLM."""
        return len(self.arranged)


@dataclass(frozen=True, slots=True)
class Cut:
    """One removal: decoder layer `layer` is the first to see fewer tokens (0: before the LLM).

    `share` is the count after this cut relative to the count after the method's last cut, so that
    a schedule keeps its proportions under any budget. `adaptive`: the tensors decide how many stay,
    also under a budget, which then holds for the other cuts; none at all may stay.
    """

    layer: int
    share: float = 1.0
    images: Images = "each"
    adaptive: bool = False


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """What all methods have. Subclasses are frozen dataclasses, one file each, derived from the
    class of the place where they act.

    Fields are the paper's hyper-parameters. Choices are pure: the same tensors give the same
    selection on every device, in every batch arrangement, and ties go to the lower index.
    """

    name: ClassVar[str]
    place: ClassVar[Place]
    positions: ClassVar[Positions] = "repacked"
    """Default of the paper for the positions of the tokens that follow a cut."""
    needs_budget: ClassVar[bool] = True
    """Whether `patch` must be given a budget. False: without one the paper's own schedule holds,
    or its adaptive rule, which is `select_adaptive`."""
    unranked: ClassVar[str | None] = None
    """Why the method gives no `Selection.scores`, or none at one of its cuts: the end of a sentence
    that begins with its name."""

    waits: ClassVar[str | None] = None
    """Why a choice waits for the device, where the algorithm forces it; None: it does not."""

    def __post_init__(self) -> None:
        """Refuse impossible fields. Overrides call `super().__post_init__()` first, which makes
        numbers of NumPy and of tensors Python's own."""
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))

    @property
    def places(self) -> tuple[Place, ...]:
        """Everywhere the method acts, with these fields; first where it acts first."""
        return (self.place,)

    @abstractmethod
    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        """The signals that the method reads, with layers resolved for this model."""

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        """Where tokens leave the sequence, in order of depth."""
        return ()

    def fields(self) -> dict[str, object]:
        """The method's own fields and their values, for result files."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Pruning(Method):
    """A method that removes tokens from the sequence."""

    finds_count: ClassVar[bool] = False
    """Whether `select_adaptive` decides every count where no budget is given."""

    @abstractmethod
    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        """Where tokens leave the sequence, in order of depth."""

    @abstractmethod
    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose exactly `keep` of `tokens.num_tokens` tokens, 1 <= keep < num_tokens."""

    def select_batch(self, asked: Sequence[tuple[VisualTokens, int]]) -> list[Selection]:
        """`select` for several images or tiles; methods that have one pass for all override it,
        with the same answers."""
        return [self.select(tokens, keep) for tokens, keep in asked]

    def select_adaptive(self, tokens: VisualTokens) -> Selection:
        """Choose as many of the tokens as the paper's rule finds: where no budget is given, or at
        a cut that is adaptive."""
        raise NotImplementedError(f"{self.name} has no rule for its own number of tokens.")

    def most(self, num_tokens: int) -> int:
        """Without a budget: the count after the last cut of the paper's schedule, or the largest
        that `select_adaptive` may keep of `num_tokens`."""
        return num_tokens

    def counts(self, shape: ModelShape, num_tokens: int, keep: int) -> tuple[int, ...]:
        """Tokens alive after each of `cuts` if `keep` of `num_tokens` are to stay in the end."""
        return tuple(round(keep * cut.share) for cut in self.cuts(shape))


@dataclass(frozen=True, kw_only=True)
class InDecoder(Pruning):
    """A method that removes tokens between layers of the LLM decoder, in prefill."""

    place: ClassVar[Place] = Place.DECODER


@dataclass(frozen=True, kw_only=True)
class BeforeLLM(Pruning):
    """A method that chooses once per image, between the vision encoder and the LLM; a second stage
    may follow in the decoder (cuts at layers above 0).

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

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        return (Cut(0),)


# --- Methods on the KV cache -------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntries:
    """What one decoder layer stored of one prompt in prefill: S entries, in their order."""

    layer: int
    keys: Tensor
    """(H_kv, S, D_head) as attention uses them."""
    values: Tensor
    """(H_kv, S, D_head)"""
    queries: Tensor
    """(H, S, D_head) as attention uses them."""
    visual: Tensor
    """(S,) bool: which entries are visual tokens."""
    signals: Mapping[Signal, Tensor]
    """What the method declared, per entry: (S, ...)."""
    attention: Any
    """The layer's attention module."""
    hidden: Tensor
    """(S, D): the input of the attention module."""
    rotary: tuple[Tensor, Tensor]
    """Cosines and sines of the entries' positions, (S, D_head) each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compressed:
    """What stays of `CacheEntries`."""

    kept: Tensor
    """(K,) int64 ascending; or (H_kv, K), where every key head keeps entries of its own."""
    keys: Tensor | None = None
    """(H_kv, K, D_head) in place of the kept entries' own, for methods that merge."""
    values: Tensor | None = None
    scores: Tensor | None = None
    """(S,) or (H_kv, S) floating, as `Selection.scores`."""


@dataclass(frozen=True, kw_only=True)
class CacheMethod(Method):
    """A method that acts on stored keys and values and leaves the sequence as it is.

    A budget counts visual tokens, as everywhere: as many entries stay as if that share of them had
    been removed, whichever entries the method chooses among.
    """

    place: ClassVar[Place] = Place.CACHE


@dataclass(frozen=True, kw_only=True)
class Compressing(CacheMethod):
    """A method that removes entries after prefill.

    Of signals it may declare `ReceivedInLayer`; `CacheEntries` holds everything else.
    """

    @abstractmethod
    def compress(self, entries: CacheEntries, keep: int) -> Compressed:
        """Keep exactly `keep` entries of one layer, text included, 1 <= keep < S."""

    def evict(self, *, prompt: int, kept: int, stored: int, seen: int) -> int | None:
        """The entry to remove after a decoding step, None for none.

        Args:
            prompt: entries of the prompt before `compress`, of which it kept `kept`.
            stored: entries now, the new token's included.
            seen: tokens fed so far, the prompt's and all new ones.
        """
        return None


@dataclass(frozen=True, kw_only=True)
class Attending(CacheMethod):
    """A method that keeps everything, and lets a decoding step attend to a few entries only."""

    needs_budget: ClassVar[bool] = False

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return ()

    @property
    def always(self) -> int:
        """Entries that are attended to whatever the budget: it must be larger."""
        return 0

    @abstractmethod
    def attended(
        self, query: Tensor, keys: Tensor, valid: Tensor | None, keep: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """The entries that one new token of each row attends to in one layer.

        Args:
            query: (B, H, D_head); with re-packed positions neither it nor the keys are rotated.
            keys: (B, H_kv, S, D_head), the new token's last.
            valid: (B, S) bool, entries that are no padding; None: all of them.
            keep: (B,) the budget, entries of each row, on the CPU; None: as published.

        Returns:
            columns (B, K), ascending, and which of them count (B, K) bool (None: each one, known
            without looking at the device); None for all entries.
        """
