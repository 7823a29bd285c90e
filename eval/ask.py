"""`vlmprune ask`: one question about one picture, dense and pruned, and what was saved."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from ..prune.budget import Budget
from ..prune.contract import Positions
from ..prune.errors import BudgetError, MethodFieldError, VlmpruneError
from .compose import Parts, parse
from .console import stdout
from .evaluate import Evaluator, Sample
from .loading import EMBEDDED, load, load_clip, resolve_device, short_name
from .results import Measured, parts_text
from .stats import Spread
from .table import Table, milliseconds
from .task import EmbeddedTask, Question

_REPEATS = 5


class InputError(VlmpruneError, ValueError):
    """A picture or question that cannot be read."""


@dataclass(frozen=True)
class _Asked:
    """A `Question` typed by the user; `answer` is empty where nobody knows it."""

    question: str
    image: Image.Image
    answer: str = ""
    kind: str = ""
    id: str = "asked"


@dataclass(frozen=True)
class _OneQuestion:
    """The `Task` of a single question."""

    question: Question
    max_new_tokens: int
    name: str = "ask"
    version: str = "1"

    def questions(self, limit: int | None) -> list[Question]:
        return [self.question]

    def prompt(self, processor: Any, question: Question) -> str:
        return EmbeddedTask().prompt(processor, question)

    def is_correct(self, prediction: str, question: Question) -> bool:
        return prediction.strip() == question.answer


def run(
    *,
    image: str,
    question: str | None,
    method_name: str,
    method_args: Sequence[str],
    budget: dict[str, float],
    positions: Positions | None,
    save: str | None,
    max_new_tokens: int,
    model_name: str,
    device: str | None,
    dtype: str,
    attn_implementation: str | None,
    clip: str | None = None,
) -> int:
    """The command; arguments are the flags of `vlmprune ask`. Returns the exit code."""
    parts = _parts(method_name, method_args, Budget.of(**budget))
    calls = [part.call for part in parts]
    _check_save(save)
    asked = _read(image, question)
    device = resolve_device(device)
    model, processor = load(
        model_name, dtype=dtype, attn_implementation=attn_implementation, device=device
    )
    task = _OneQuestion(asked, max_new_tokens)
    evaluator = Evaluator(
        model,
        processor,
        task,
        [asked],
        batch_size=1,
        timed_questions=1,
        repeats=_REPEATS,
        clip=load_clip(clip, processor, device=device),
    )
    dense, (dense_sample,) = evaluator.run()
    pictures: list[Image.Image] = []
    pruned, (pruned_sample,) = evaluator.run(
        calls,
        positions=positions,
        inspect=lambda handle: pictures.append(handle.overlay(asked.image)),
    )
    table = _table(parts_text(parts), (dense, dense_sample), (pruned, pruned_sample))
    console = stdout()
    console.print(f"{short_name(model_name)}: {asked.question}", markup=False)
    if asked.answer:
        console.print(f"right answer: {asked.answer}", markup=False)
    table.print(console)
    for note in pruned["notes"]:
        sys.stderr.write(f"note: {note}\n")
    if save:
        pictures[0].save(save)
        sys.stderr.write(f"kept tokens: {save}\n")
    return 0


def _parts(word: str, method_args: Sequence[str], budget: Budget | None) -> Parts:
    """What was typed, with `budget` for the parts that have none of their own."""
    if method_args and "+" in word:
        raise MethodFieldError(
            f"--method_args says not which part of {word!r} it is for: write the fields into the "
            f"word, e.g. divprune@0.5+fastv:layer=3."
        )
    parts = parse(":".join([word, *method_args]))
    if budget is not None and not any(part.open for part in parts):
        raise BudgetError(f"{word!r} has its own budgets: leave {budget} out.")
    found = tuple(part.at(budget) for part in parts)
    for part in found:
        if part.budget is None and part.method.needs_budget:
            name = part.method.name
            raise BudgetError(
                f"{name} needs a budget: give one of --keep_ratio 0.25, --keep_tokens 64, "
                f"--average_tokens 128 or --flops_ratio 0.3, or write it behind the method, "
                f"{name}@0.25."
            )
    return found


def _check_save(save: str | None) -> None:
    """Refuse a file that cannot be written before any work is done."""
    if save is None:
        return
    path = Path(save)
    if path.suffix.lower() not in Image.registered_extensions():
        raise InputError(f"--save {save!r} has no suffix of a picture: write for example kept.png.")
    if not path.parent.is_dir():
        raise InputError(f"--save {save!r}: the folder {str(path.parent)!r} does not exist.")


def _read(image: str, question: str | None) -> _Asked | Question:
    if image.startswith(f"{EMBEDDED}:"):
        questions = EmbeddedTask().questions(None)
        number = image.partition(":")[2]
        if not number.isdigit() or int(number) >= len(questions):
            raise InputError(
                f"{image!r} is no question of the embedded benchmark: use embedded:0 to "
                f"embedded:{len(questions) - 1}."
            )
        found = questions[int(number)]
        return _Asked(question, found.image) if question else found
    if not question:
        raise InputError('No question given: vlmprune ask IMAGE "QUESTION" --method ...')
    try:
        picture = Image.open(Path(image)).convert("RGB")
    except UnidentifiedImageError:
        raise InputError(f"{image!r} is not a picture that Pillow can read.") from None
    except OSError as error:
        raise InputError(f"{image!r} cannot be read: {error.strerror or error}.") from error
    return _Asked(question, picture)


def _table(
    pruned_name: str, dense: tuple[Measured, Sample], pruned: tuple[Measured, Sample]
) -> Table:
    """One line a quantity: dense, pruned, and the share saved."""
    a, b = dense[0], pruned[0]

    def line(name: str, before: float, after: float, text: str) -> tuple[str, ...]:
        saved = f"{100 * (1 - after / before):.0f} %" if before else ""
        return name, text.format(before), text.format(after), saved

    def times(name: str, before: Spread | None, after: Spread | None) -> list[tuple[str, ...]]:
        if before is None or after is None:
            return []
        saved = f"{100 * (1 - after['median'] / before['median']):.0f} %"
        return [(f"{name} (ms)", milliseconds(before), milliseconds(after), saved)]

    tokens_a, tokens_b = a["tokens"], b["tokens"]
    return Table(
        headers=("", "dense", pruned_name, "saved"),
        rows=[
            ("answer", dense[1].prediction, pruned[1].prediction, ""),
            line("visual tokens", tokens_a["kept_per_image"], tokens_b["kept_per_image"], "{:.0f}"),
            line(
                "average per layer",
                tokens_a["average_per_layer"],
                tokens_b["average_per_layer"],
                "{:.1f}",
            ),
            line(
                "prefill GFLOPs",
                a["flops"]["prefill"] / 1e9,
                b["flops"]["prefill"] / 1e9,
                "{:.3g}",
            ),
            line(
                "GFLOPs with vision",
                a["flops"]["first_token"] / 1e9,
                b["flops"]["first_token"] / 1e9,
                "{:.3g}",
            ),
            line("KV cache (KiB)", a["kv_bytes"] / 1024, b["kv_bytes"] / 1024, "{:.0f}"),
            *times("first token", a["times"]["first_token"], b["times"]["first_token"]),
            *times(
                "each next token", a["times"]["per_decoded_token"], b["times"]["per_decoded_token"]
            ),
        ],
        numbers_from=1,
        wrapping=(1, 2),
    )
