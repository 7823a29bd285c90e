"""What is asked of a sweep, on the command line or in Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...prune.errors import MethodFieldError
from ..models.request import ModelRequest

if TYPE_CHECKING:
    from ...prune.contract import Positions
    from ..tasks.jsonl import JsonlTask


class GridRequest(Protocol):
    """What a grid on loaded benchmarks is run with; see `SweepRequest`."""

    @property
    def positions(self) -> Positions | None: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def output_path(self) -> Path | None: ...
    @property
    def samples(self) -> Path | None: ...
    @property
    def rerun(self) -> bool: ...


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """A grid of methods x budgets, the questions, and where results go.

    Attributes:
        methods, budgets: words as on the command line.
        depths: decoder layers at each of which methods are run that cut there; empty: at their own.
        positions: of rotary embeddings after a cut; None: those of each method's paper.
        limit: so many questions of every task; None: all.
        kinds: only questions of these kinds; empty: all.
        output_path: the folder of the results; None: they are not kept.
        log_samples: whether every answer is kept as well.
        rerun: measure again what the folder has.
        model: what to load; None: the model is loaded.
        tasks: names; without any, and without `own`, the embedded benchmark.
        own: tasks that were read from files.
        include_path: a folder with further tasks of lmms-eval.
        settings: all flags, as they are written to `sweep.yaml` beside the results.

    Raises:
        MethodFieldError: `methods` or `budgets` are no lists of words.
    """

    methods: Sequence[str]
    budgets: Sequence[str | float]
    depths: Sequence[int] = ()
    positions: Positions | None = None
    limit: int | None = None
    kinds: Sequence[str] = ()
    batch_size: int
    seed: int = 0
    output_path: Path | None = None
    log_samples: bool = False
    rerun: bool = False
    model: ModelRequest | None = None
    tasks: Sequence[str] = ()
    own: Sequence[JsonlTask] = ()
    include_path: str | None = None
    settings: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        for given, named in ((self.methods, "methods"), (self.budgets, "budgets")):
            if isinstance(given, str) or not isinstance(given, Iterable):
                raise MethodFieldError(f"{named}={given!r} is no list: write {named}=[{given!r}].")
        for word in self.methods:
            if not isinstance(word, str):
                raise MethodFieldError(
                    f"{word!r} is no word: register the class, and write its name, e.g. 'fastv'."
                )

    @property
    def budget_words(self) -> list[str]:
        return [str(budget) for budget in self.budgets]

    @property
    def samples(self) -> Path | None:
        """The folder of all answers."""
        return self.output_path / "samples" if self.output_path and self.log_samples else None
