"""What a method declares, and the classes that methods derive from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from torch import Tensor

from ..amount import Budget
from ..errors import BudgetError, MethodFieldError
from ..numbers import plain
from .place import Cut, Place, Positions
from .reduction import BlockCut, EncoderRows, Reduction
from .shape import ModelShape, Tower
from .signals import Signal
from .thinned import Thinned
from .tokens import CacheEntries, Compressed, Selection, VisualTokens

Newlines = Literal["drop", "keep", "compete"]
"""What becomes of newline tokens: all dropped (unless the budget has room for them after all
patches), all kept and counted, or candidates like any other token."""
Scope = Literal["tile", "image"]
"""Whether a method chooses within each tile, whose shares of the budget follow its size, or among
all tokens of the image at once."""


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
    or its adaptive rule, which is `select_adaptive`. See `wants_budget`."""
    unbudgeted: ClassVar[str | None] = None
    """Why no budget says how many tokens stay, and what does: the end of a sentence that begins
    with the method's name. None: budgets do."""
    unranked: ClassVar[str | None] = None
    """Why the method gives no `Selection.scores`, or none at one of its cuts: the end of a sentence
    that begins with its name."""

    without_cls: ClassVar[Mapping[str, object]] = {}
    """Fields to set so that the mean attention that each token receives stands in for CLS, on
    encoders that have none."""
    without_clip: ClassVar[Mapping[str, object]] = {}
    """Fields to set so that the embeddings of the prompt stand in for CLIP's text encoder."""
    retired: ClassVar[Mapping[str, object]] = {}
    """Fields that earlier versions had, with the value that they had in all results: these are
    found again under the same id."""
    gained: ClassVar[Mapping[str, object]] = {}
    """Fields that earlier versions did not have, with the value at which the method is as it was:
    results with it have the id that they had."""
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

    @property
    def wants_budget(self) -> bool:
        """Whether `patch` must be given a budget, with these fields."""
        return self.needs_budget

    @abstractmethod
    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        """The signals that the method reads, with layers resolved for this model."""

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        """Where tokens leave the sequence, in order of depth."""
        return ()

    def check_budget(self, budget: Budget | None) -> None:
        """Raise `BudgetError` for a budget that no model can bring the method to."""
        if budget is not None and self.unbudgeted is not None:
            raise BudgetError(f"{self.name} takes no budget ({budget}): it {self.unbudgeted}.")

    def fields(self) -> dict[str, object]:
        """The method's own fields and their values, for result files."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


@dataclass(frozen=True, kw_only=True)
class Pruning(Method):
    """A method that removes tokens from the sequence."""

    finds_count: ClassVar[bool] = False
    """Whether the method decides every count itself where no budget is given."""
    proportional: ClassVar[bool] = False
    """Whether later blocks of the encoder, or layers of the decoder and all tokens after the
    prompt, attend to a merged row as to all that is in it: log(size) more."""
    least: ClassVar[int] = 1
    """The fewest tokens of an image that a cut may leave; 0: all may go."""

    @abstractmethod
    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        """Where tokens leave the sequence, in order of depth."""

    def most(self, num_tokens: int) -> int:
        """Without a budget: the count after the last cut of the paper's schedule, or the largest
        that the method may keep of `num_tokens` where it decides."""
        return num_tokens

    def counts(self, shape: ModelShape, num_tokens: int, keep: int) -> tuple[int, ...]:
        """Tokens alive after each of `cuts` if `keep` of `num_tokens` are to stay in the end."""
        return tuple(round(keep * cut.share) for cut in self.cuts(shape))

    def published_counts(self, shape: ModelShape, num_tokens: int) -> tuple[int, ...]:
        """Without a budget: tokens alive after each of `cuts`, by the paper's schedule."""
        return self.counts(shape, num_tokens, self.most(num_tokens))


@dataclass(frozen=True, kw_only=True)
class Choosing(Pruning):
    """A method that chooses among the tokens of an image."""

    @abstractmethod
    def select(self, tokens: VisualTokens, keep: int) -> Selection:
        """Choose exactly `keep` of `tokens.num_tokens` tokens, least <= keep < num_tokens."""

    def select_batch(self, asked: Sequence[tuple[VisualTokens, int]]) -> list[Selection]:
        """`select` for several images or tiles; methods that have one pass for all override it,
        with the same answers."""
        return [self.select(tokens, keep) for tokens, keep in asked]

    def select_adaptive(self, tokens: VisualTokens) -> Selection:
        """Choose as many of the tokens as the paper's rule finds: where no budget is given, or at
        a cut that is adaptive."""
        raise NotImplementedError(f"{self.name} has no rule for its own number of tokens.")


@dataclass(frozen=True, kw_only=True)
class InEncoder(Pruning):
    """A method that removes rows between blocks of the vision encoder, picture by picture.

    Every picture (tile, frame) of an image has its share of the image's budget, which counts the
    rows behind the last block that the projector reads. Newlines leave with the first rows.
    """

    place: ClassVar[Place] = Place.ENCODER
    unranked: ClassVar[str | None] = "removes rows block by block, and ranks them anew in each"
    fused_values: ClassVar[bool] = False
    """Whether the block's attention reads the values of merged rows already."""
    restores: ClassVar[bool] = False
    """Whether all rows come back behind the last block that is read: the LLM sees all tokens."""

    @abstractmethod
    def blocks(self, tower: Tower) -> tuple[BlockCut, ...]:
        """Where rows leave, in order of depth, in blocks that the projector reads. In a windowed
        encoder only blocks that see the whole picture can be cut."""

    @abstractmethod
    def block_counts(self, tower: Tower, rows: int, keep: int | None) -> tuple[int, ...]:
        """Rows alive after each of `blocks` in a picture of `rows`, if `keep` are to stay in the
        end; None: as the method's own fields say.

        Raises:
            BudgetError: that many cannot stay; the nearest count that can is named.
        """

    @abstractmethod
    def reduce(self, rows: EncoderRows, keep: int) -> Reduction:
        """Exactly `keep` rows of each picture, 1 <= keep < N."""

    def restore(self, before: Tensor, after: Tensor, done: Reduction) -> Tensor:
        """All rows (B, N, C) from those at the cut, `before` (B, N, C), and what became of the K
        that stayed, `after` (B, K, C), by the reduction that was made."""
        raise NotImplementedError(f"{self.name} does not restore rows.")

    def reachable(self, grid: tuple[int, int], keep: int) -> int:
        """Where rows are restored, so that a share of them need not be exact: the count nearest to
        `keep` that can stay of a picture's grid of rows and columns."""
        return keep

    def fuses(self, tower: Tower) -> bool:
        """Whether some of the rows that it leaves stand for no patch."""
        return False

    def reads(self, cut: BlockCut, tower: Tower) -> tuple[Signal, ...]:
        """The signals of its block that the method reads at a cut."""
        return ()

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        tower = shape.tower
        return tuple(need for cut in self.blocks(tower) for need in self.reads(cut, tower))

    def cuts(self, shape: ModelShape) -> tuple[Cut, ...]:
        return () if self.restores else (Cut(Place.ENCODER),)

    def check_budget(self, budget: Budget | None) -> None:
        super().check_budget(budget)
        if (
            self.restores
            and budget is not None
            and budget.word not in ("keep_ratio", "keep_tokens")
        ):
            raise BudgetError(
                f"{self.name} cannot reach {budget}: the LLM sees all tokens again. Give "
                f"keep_ratio or keep_tokens, which then count the rows inside the vision encoder."
            )


@dataclass(frozen=True, kw_only=True)
class InDecoder(Choosing):
    """A method that removes tokens between layers of the LLM decoder, in prefill."""

    place: ClassVar[Place] = Place.DECODER

    def thinned(self, shape: ModelShape) -> tuple[Thinned, ...]:
        """Layers that compute with less of something else than tokens, one entry for each."""
        return ()

    def choose_heads(self, given: Tensor, keep: int) -> Tensor:
        """Exactly `keep` of the A key heads that are alive in front of a layer, (B, keep),
        ascending, from what each layer with attention so far gave through them: sums of magnitudes
        over heads' outputs and the prompt's tokens that were alive there, (B, l, A) float32."""
        raise NotImplementedError(f"{self.name} does not choose heads.")

    def core_neurons(self, activations: Tensor, keep: int) -> Tensor:
        """Exactly `keep` neurons (K,), ascending, of a layer that `thinned` names, from what the
        prompt's tokens that are alive there made of them: (n, M)."""
        raise NotImplementedError(f"{self.name} does not choose neurons.")


@dataclass(frozen=True, kw_only=True)
class BeforeLLM(Choosing):
    """A method that chooses once per image, between the vision encoder and the LLM; a second stage
    may follow in the decoder (cuts at layers above 0).

    `newlines` and `scope` override the first of the values that the method allows, which is its
    paper's.
    """

    place: ClassVar[Place] = Place.BEFORE_LLM
    newline_policies: ClassVar[tuple[Newlines, ...]] = ("drop", "keep")
    scopes: ClassVar[tuple[Scope, ...]] = ("tile",)
    needs_grid: ClassVar[bool] = False
    """Whether the method reads where tokens lie: then it needs all of them, and cannot follow one
    that removes tokens in the vision encoder."""

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
        return (Cut(Place.BEFORE_LLM),)


# --- Methods on the KV cache -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CacheMethod(Method):
    """A method that acts on stored keys and values and leaves the sequence as it is.

    A budget counts visual tokens, as everywhere: as many entries stay as if that share of them had
    been removed, whichever entries the method chooses among.
    """

    place: ClassVar[Place] = Place.CACHE

    def check_budget(self, budget: Budget | None) -> None:
        super().check_budget(budget)
        if budget is not None and budget.word in ("average_tokens", "flops_ratio"):
            raise BudgetError(
                f"{self.name} cannot reach {budget}: it acts on the KV cache, and every layer of "
                f"the prefill sees all tokens. Give keep_ratio or keep_tokens."
            )


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
