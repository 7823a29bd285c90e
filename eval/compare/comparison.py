"""`vlmprune.compare`: one question about one picture, to the dense model and with methods."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

from PIL import Image

from ...prune.budget import Budget, MethodCall
from ...prune.contract import Positions
from ...prune.errors import BudgetError, MethodFieldError, VlmpruneError
from ..image_file import InputError, read_picture
from ..measure.evaluate import Evaluator
from ..models.picture_fit import picture_fit
from ..results.records import Measured, budget_text, cache_text, method_record
from ..results.texts import milliseconds
from ..sweep.grid import REFUSALS
from ..table import Table
from ..tasks.protocols import Question
from ..tasks.questions import chat_prompt, normalise
from ..vocabulary_note import vocabulary_note
from ..words.parts import Part, Parts, grid, parse, parse_budgets
from ..words.said import changed_fields
from .asked import Asked
from .side_by_side import Panel, data_url, side_by_side

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel

    from ...adapters.clip_text import ClipText

Wanted = str | MethodCall | Sequence[str | MethodCall]
"""A method, or several that act together: names, command-line words, `vlmprune.method(...)`."""


@dataclass(frozen=True)
class OneQuestion:
    """The `Task` of a single question, put through the model's own chat template."""

    question: Question
    max_new_tokens: int
    name: str = "ask"
    version: str = "1"

    def questions(self, limit: int | None) -> list[Question]:
        return [self.question]

    def prompt(self, processor: Any, question: Question) -> str:
        return chat_prompt(processor, question.question)

    def is_correct(self, prediction: str, question: Question) -> bool:
        return normalise(prediction) == normalise(question.answer)


@dataclass(frozen=True, kw_only=True)
class Asking:
    """How the question is put: `repeats` are the times that each is timed."""

    max_new_tokens: int = 32
    positions: Positions | None = None
    repeats: int = 3


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one method made of the question, or why it could not (`refusal`)."""

    name: str
    """As it is typed on the command line, budget included; `dense` for the model as it is."""
    answer: str = ""
    correct: bool | None = None
    """None where the right answer is not known."""
    measured: Measured | None = None
    """Everything that a sweep records."""
    picture: Image.Image | None = None
    """The image with what was kept of it; for the dense model the image."""
    refusal: VlmpruneError | None = None

    @property
    def tokens(self) -> float | None:
        """Visual tokens alive after the last cut."""
        return self.measured["tokens"]["kept_per_image"] if self.measured else None

    @property
    def cache_tokens(self) -> float | None:
        """Visual entries that a method on the cache left for a new token, a mean over layers; None
        without such a method."""
        return self.measured["tokens"].get("cache_per_image") if self.measured else None

    @property
    def average_tokens(self) -> float | None:
        """Visual tokens that enter a decoder layer, on average."""
        return self.measured["tokens"]["average_per_layer"] if self.measured else None

    @property
    def flops_share(self) -> float | None:
        """Prefill FLOPs over visual tokens, as a share of the dense model's."""
        return self.measured["flops"]["visual_share"] if self.measured else None

    @property
    def kv_bytes(self) -> float | None:
        """Bytes that the KV cache holds after the prompt."""
        return self.measured["kv_bytes"] if self.measured else None

    @property
    def first_token_seconds(self) -> float | None:
        """Median time to the first token."""
        spread = self.measured["times"]["first_token"] if self.measured else None
        return spread["median"] if spread else None


@dataclass(frozen=True, repr=False)
class Comparison:
    """The answers side by side: `rows` (the dense model first), `table()` and `picture()`.

    Shown as both in a notebook; `str()` is the table as Markdown.
    """

    question: str
    rows: tuple[Row, ...]
    right_answer: str = ""
    notes: tuple[str, ...] = ()
    """What to know about it, e.g. words of the question that the model does not have."""

    @property
    def dense(self) -> Row:
        return self.rows[0]

    def table(self) -> Table:
        """One line a method."""
        return Table(
            headers=(
                "Method",
                "Answer",
                "Tokens",
                "Avg/layer",
                "FLOPs %",
                "KV KiB",
                "First token ms",
            ),
            rows=[_cells(row) for row in self.rows],
            title=self.question,
            notes="\n".join(f"Note: {note}" for note in self.notes) or None,
            wrapping=(1,),
        )

    def to_frame(self) -> pd.DataFrame:
        """The rows as a pandas data frame, with everything that was measured.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        from ..results.frame import comparison_frame

        return comparison_frame(
            [
                (
                    {
                        "method": row.name,
                        "answer": row.answer,
                        "correct": row.correct,
                        "refusal": str(row.refusal) if row.refusal else "",
                    },
                    row.measured,
                )
                for row in self.rows
            ]
        )

    def picture(self, columns: int = 3) -> Image.Image:
        """The picture with each method's kept tokens and its answer, `columns` beside each other.

        Answers are green or red where the right one is known.
        """
        title = self.question + (f"   ({self.right_answer})" if self.right_answer else "")
        panels = [
            Panel(row.picture, _caption(row), row.answer, _COLORS[row.correct])
            for row in self.rows
            if row.picture is not None
        ]
        return side_by_side(title, panels, columns)

    def __repr__(self) -> str:
        return f"<Comparison of {', '.join(row.name for row in self.rows)}: {self.question!r}>"

    def __str__(self) -> str:
        return self.table().markdown()

    def _repr_html_(self) -> str:
        table = self.table()
        head = "".join(f"<th>{html.escape(name)}</th>" for name in table.headers)
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>"
            for row in table.rows
        )
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{notes}"
            f'<img alt="{html.escape(self.question)}" src="{data_url(self.picture())}">'
        )


_COLORS = {None: "black", True: "#2a7a2a", False: "#b02020"}


def compare(
    model: PreTrainedModel,
    processor: Any,
    image: Image.Image | str | PathLike[str],
    question: str,
    methods: Wanted | Sequence[Wanted],
    *,
    keep_ratio: float | None = None,
    keep_tokens: int | None = None,
    average_tokens: float | None = None,
    flops_ratio: float | None = None,
    budgets: Sequence[str | float] = (),
    answer: str = "",
    max_new_tokens: int = 32,
    positions: Positions | None = None,
    clip: ClipText | None = None,
    repeats: int = 3,
) -> Comparison:
    """Ask one question about one picture: the model as it is, then with every method.

    Args:
        model: a patch that is on it is off meanwhile, and back afterwards.
        processor: the model's, with a chat template.
        image: a picture or its path.
        methods: names, words as on the command line ("fastv:layer=3@0.25",
            "divprune@0.5+fastv"), `vlmprune.method(...)`, or lists of these that act together.
        keep_ratio, keep_tokens, average_tokens, flops_ratio: the budget of methods that were given
            without one.
        budgets: several budgets for them instead, as on the command line: 0.25, 64, "avg:64",
            "published".
        answer: the right answer, where it is known.
        max_new_tokens: length of an answer at most.
        positions, clip: as `vlmprune.patch` takes them.
        repeats: times that each is timed.

    Returns:
        a row for each; a method that cannot run on this model has the reason in its row.

    Raises:
        InputError: the picture cannot be read, or there is no question.
        TaskError: the processor has no chat template.
        UnknownMethodError, MethodFieldError, BudgetError: each says what to type instead.
    """
    given = {
        "keep_ratio": keep_ratio,
        "keep_tokens": keep_tokens,
        "average_tokens": average_tokens,
        "flops_ratio": flops_ratio,
    }
    one = Budget.of(**{word: value for word, value in given.items() if value is not None})
    cells = _cells_of(methods, one, budgets)
    if not question.strip():
        raise InputError('The question is empty: write for example "What is in the picture?".')
    asked = Asked(question, read_picture(image), answer)
    how = Asking(max_new_tokens=max_new_tokens, positions=positions, repeats=repeats)
    return compare_cells(model, processor, asked, cells, how, clip)


def compare_cells(
    model: PreTrainedModel,
    processor: Any,
    asked: Question,
    cells: Sequence[Parts],
    how: Asking,
    clip: ClipText | None = None,
) -> Comparison:
    """As `compare`, with the cells of a grid, the dense one (nothing) first."""
    from ...adapters.wrappers import unwrapped

    model = unwrapped(model)
    task, fit = OneQuestion(asked, how.max_new_tokens), picture_fit(processor)
    evaluator = Evaluator(
        model,
        processor,
        task,
        [asked],
        batch_size=1,
        timed_questions=1,
        repeats=how.repeats,
        clip=clip,
    )
    rows = []
    for parts in cells:
        pictures: list[Image.Image] = [] if parts else [asked.image]
        name = "+".join(map(_word, parts)) or "dense"
        try:
            measured, (sample,) = evaluator.run(
                [part.call for part in parts],
                positions=how.positions if parts else None,
                inspect=lambda handle: pictures.append(handle.overlay(asked.image, fit=fit)),  # noqa: B023
            )
        except REFUSALS as refusal:
            if not parts:
                raise
            rows.append(Row(name=name, refusal=refusal))
            continue
        correct = task.is_correct(sample.prediction, asked) if asked.answer else None
        rows.append(
            Row(
                name=name,
                answer=sample.prediction,
                correct=correct,
                measured=measured,
                picture=pictures[0] if pictures else asked.image,
            )
        )
    notes = [vocabulary_note(processor, [asked.question])]
    notes += [note for row in rows if row.measured for note in row.measured["notes"]]
    said = tuple(note for note in dict.fromkeys(notes) if note)
    return Comparison(asked.question, tuple(rows), asked.answer, said)


def _cells_of(
    methods: Wanted | Sequence[Wanted], one: Budget | None, several: Sequence[str | float]
) -> list[Parts]:
    """The dense model, then every method with every budget."""
    if one is not None and several:
        raise BudgetError(f"{one} and budgets= cannot be given together: leave one of them out.")
    listed: Sequence[Wanted] = [methods] if isinstance(methods, str | MethodCall) else methods
    wanted = [_parts(each) for each in listed]
    budgets = parse_budgets([str(word) for word in several]) if several else [one]
    if budgets == [None]:
        for part in (part for parts in wanted for part in parts):
            if part.open and part.method.wants_budget:
                name = part.method.name
                raise BudgetError(
                    f"{name} needs a budget: give keep_ratio=0.25 or another one for all methods, "
                    f'budgets=["0.5", "0.25"], or write it behind the method, "{name}@0.25".'
                )
    return grid(wanted, budgets)


def _parts(wanted: Wanted) -> Parts:
    if isinstance(wanted, str):
        return parse(wanted)
    if isinstance(wanted, MethodCall):
        return (Part(wanted.method, wanted.budget),)
    if not isinstance(wanted, Sequence) or not wanted:
        raise MethodFieldError(
            f"{wanted!r} is no method: give a name, a word such as "
            f'"divprune@0.5+fastv:layer=3@0.25", vlmprune.method(...), or a list of these.'
        )
    return tuple(part for each in wanted for part in _parts(each))


def _word(part: Part) -> str:
    """A method as it is typed on the command line."""
    fields = changed_fields(part.method.name, part.method.fields(), seed=0)
    budget = budget_text({"config": {"methods": [method_record(part)]}})
    return f"{':'.join([part.method.name, *fields])}@{budget}"


def _cells(row: Row) -> tuple[str, ...]:
    if row.measured is None:
        reason = str(row.refusal).partition(": ")[0].partition(". ")[0]
        return (row.name, f"not applicable: {reason}", *[""] * 5)
    return (
        row.name,
        row.answer,
        f"{row.tokens:.0f}{cache_text(row.measured['tokens'])}",
        f"{row.average_tokens:.1f}",
        f"{100 * (row.flops_share or 0):.1f}",
        f"{(row.kv_bytes or 0) / 1024:.0f}",
        milliseconds(row.measured["times"]["first_token"]),
    )


def _caption(row: Row) -> str:
    count = f"{row.tokens:.0f} tokens"
    if row.name == "dense":
        return f"all {count}"
    if (left := row.cache_tokens) is not None:
        count += f", cache {left:.4g} of {row.tokens:.0f} per layer (mean)"
    return f"{row.name}: {count}"
