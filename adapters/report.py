"""`handle.last`: what the last prefill with visual tokens did."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..prune.budget import Stage, tokens_per_layer
from ..prune.contract import Place, Positions
from ..prune.errors import NotRecordedError
from ..prune.tiling import Tiling
from .cache.report import CacheReport
from .encoded import Entering
from .stopwatch import Stopwatch

NO_IMAGES = "the last prefill had no images"
"""The note of a prefill without visual tokens."""
DISABLED = "the last prefill ran inside handle.disabled(): nothing was pruned"


@dataclass(frozen=True, slots=True)
class StageReport:
    """One cut: decoder layer `layer` (0: all of them) is the first that sees only `kept` (per
    image, numbers of tokens, ascending).

    Where rows were merged or moved, `order` says per image which of the rows alive before the cut
    each row is (-1: none of them), and `groups` holds (2, G) pairs of a row and a row before that
    was merged into it. `positions` is the mode of this cut.
    """

    method: str
    place: Place
    layer: int
    kept: list[Tensor]
    positions: Positions = "original"
    order: list[Tensor | None] = field(default_factory=list)
    groups: list[Tensor | None] = field(default_factory=list)
    scores: list[Tensor | None] | None = field(default=None, repr=False)
    """Per image, the numbers by which the method ranked the tokens here, high ones stay: (N,)
    float32, NaN where a token was not ranked or no longer alive. An image's are None where the
    method ranks by no number, or nothing was removed. None: not recorded."""
    rows: list[Tensor | None] = field(default_factory=list, repr=False)
    """Per image, the token of the prompt that each row alive after the cut is, -1 for none; None:
    those of `kept`."""
    members: list[Tensor | None] = field(default_factory=list, repr=False)
    """Per image, (2, G) pairs of such a row and a token of the prompt merged into it so far."""
    below: bool = False
    """Whether the layers before this one store no more than `kept`, either."""

    @property
    def where(self) -> str:
        """The place of the cut in words."""
        return f"at layer {self.layer}" if self.place is Place.DECODER else self.place.value


@dataclass(kw_only=True)
class Last:
    """What the last prefill that saw visual tokens did.

    Images and videos are in the order of the prompts (beams not expanded). Tokens are numbered by
    their places among the visual tokens of their image in the prompt, newline tokens included.
    """

    tilings: list[Tiling]
    """How the tokens of each image lie."""
    kept: list[Tensor]
    """Per image, sorted numbers of the tokens alive after the last cut (int64). Rows that stand for
    no token of the prompt (CLS, aggregates) are not among them."""
    order: list[Tensor | None]
    """Per image, its rows in the order in which the LLM sees them, where that is not `kept`: -1
    for rows that stand for no token."""
    tokens_kept: list[int]
    """Per image, rows alive after the last cut."""
    image_sample: list[int]
    """The row of the batch that each image belongs to."""
    text_tokens: list[int]
    """Per sample, real tokens that are not visual."""
    plans: list[tuple[Stage, ...]]
    """Per image, the cuts and their counts."""
    positions: Positions
    num_layers: int
    layers_read: dict[str, list[int]]
    """Layers that each method reads on this model, by signal."""
    stopwatches: list[Stopwatch] = field(repr=False)
    members: list[Tensor | None] = field(repr=False)
    """Per image, (2, G) pairs of a row and a token merged into it; see `groups`."""
    stages: list[StageReport] = field(default_factory=list)
    encoder: list[Entering] = field(default_factory=list, repr=False)
    """Per block of the vision encoder from the first that rows left in, as far as blocks ran: the
    rows of each picture (tile, frame) that entered its attention, and its MLP. Rows are patches, or
    the merge units of Qwen; CLS is not counted. Of images first, then of videos; empty where
    nothing left, or where all images were remembered."""
    entries: list[list[Tensor | None]] = field(default_factory=list, repr=False)
    """[layer][sample]: which entries of the prompt a method on the cache kept, of those that the
    layer stored: (K,), or (H_kv, K) where key heads keep their own; None: all."""
    heads: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """By decoder layer, the key heads that attention goes through in each row of the batch,
    ascending (B, K); in other layers all."""
    neurons: dict[int, Tensor] = field(default_factory=dict, repr=False)
    """By decoder layer, the neurons of its MLP that decoding goes on with, ascending (K,); of other
    layers all."""
    cache: CacheReport | None = field(default=None, repr=False)
    """What a method on the cache left, by token; None where none removed anything."""
    unranked: dict[str, str | None] = field(default_factory=dict, repr=False)
    """Why methods have no scores, by name; None: they have."""
    note: str | None = None
    """What else is to say: why nothing was pruned, or of a budget that an image cannot have."""
    recorded: bool = False
    """Whether scores were kept, see `scores`."""

    @classmethod
    def nothing(cls, positions: Positions, num_layers: int, note: str) -> Last:
        """A prefill in which no visual token was known."""
        return cls(
            tilings=[],
            kept=[],
            order=[],
            tokens_kept=[],
            image_sample=[],
            text_tokens=[],
            plans=[],
            positions=positions,
            num_layers=num_layers,
            layers_read={},
            stopwatches=[],
            members=[],
            note=note,
        )

    @property
    def tokens_in(self) -> list[int]:
        """Per image, its visual tokens before any cut."""
        return [tiling.num_tokens for tiling in self.tilings]

    @property
    def groups(self) -> list[list[Tensor] | None]:
        """Per image, the tokens that each row was merged from (empty: the row is one token as it
        was); None where nothing was merged."""
        return [
            None
            if pairs is None
            else list(pairs[1].split(pairs[0].bincount(minlength=rows).tolist()))
            for pairs, rows in zip(self.members, self.tokens_kept, strict=True)
        ]

    @property
    def scores(self) -> list[Tensor | None]:
        """Per image, the `StageReport.scores` of the last stage that has any for it; of a method on
        the cache, means over layers.

        Raises:
            NotRecordedError: the patch was made without `record=True`.
        """
        if not self.recorded:
            raise NotRecordedError(
                "The scores of this prefill were not kept: patch(..., record=True) keeps them."
            )
        found: list[Tensor | None] = [None] * len(self.tilings)
        for stage in self.stages:
            for image, scores in enumerate(stage.scores or ()):
                found[image] = found[image] if scores is None else scores
        if self.cache is not None:
            of_cache = map(self.cache.ranked, range(len(found)))
            found = [a if b is None else b for a, b in zip(found, of_cache, strict=True)]
        return found

    @property
    def cache_kept(self) -> list[list[float]] | None:
        """[sample][layer]: visual entries that a method on the cache left after the prompt, a mean
        over key heads, 0 in a layer that keeps a state; None where none removed anything."""
        return None if self.cache is None else self.cache.kept

    @property
    def pruned(self) -> bool:
        """Whether any token was removed."""
        return self.tokens_kept != self.tokens_in

    @property
    def tokens_per_layer(self) -> list[list[int]]:
        """[sample][layer]: visual tokens that entered each decoder layer."""
        totals = [[0] * self.num_layers for _ in self.text_tokens]
        for sample, tokens, plan in zip(self.image_sample, self.tokens_in, self.plans, strict=True):
            entering = tokens_per_layer(tokens, plan, self.num_layers)
            totals[sample] = [a + b for a, b in zip(totals[sample], entering, strict=True)]
        return totals

    @property
    def select_seconds(self) -> float:
        """Time spent choosing tokens, probes not included."""
        return sum(stopwatch.seconds for stopwatch in self.stopwatches)

    def _cache_text(self) -> str:
        """Per sample, the mean over layers of visual entries left and of those that came."""
        left = [sum(layers) / len(layers) for layers in self.cache_kept or ()]
        came = [sum(layers) / len(layers) for layers in self.tokens_per_layer]
        counts = (f"{a:.4g} of {b:.4g}" for a, b in zip(left, came, strict=True))
        return f"{', '.join(counts)} per layer"

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{a}->{b}" for a, b in zip(self.tokens_in, self.tokens_kept, strict=True)
        )
        note = f", note={self.note!r}" if self.note else ""
        left = "" if self.cache_kept is None else f", cache {self._cache_text()}"
        return f"Last(tokens {counts or 'none'}{left}, positions={self.positions!r}{note})"
