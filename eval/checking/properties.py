"""Whether a method does what it promises: on tiny models of all layouts, one property at a time."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...adapters.family import IMAGE
from ...adapters.handle import Handle
from ...adapters.patching import patch
from ...adapters.registry import family_of
from ...prune.answers.answer import looks_at_values
from ...prune.budget import Budget, MethodCall, entries_kept, round_tokens
from ...prune.contract import Attending, Choosing, Compressing, InEncoder, Method
from ...prune.declared import check_declared
from ...prune.errors import (
    BudgetError,
    MethodAnswerError,
    MissingSignalError,
    UnsupportedFeatureError,
    UnsupportedModelError,
    VlmpruneError,
)
from ..models.tiny_layouts import BATCH, Row, images
from ..models.tiny_models import Case
from .asked import Question, copied, listening, same
from .cases import CASES
from .in_encoder import exact_rows, pictures_alone, rows_whole
from .outcome import Broken, NotApplicable
from .tiny_clip import clip
from .waiting import WaitsError, no_waiting

State = Literal["pass", "FAIL", "n/a"]
LAYOUTS = tuple(name for name, case in CASES.items() if case.checked)
"""Tiny models: an encoder with CLS and one without, tiles and newlines, merged patches of any grid
with M-RoPE."""
RATIOS = (0.5, 0.25)


@dataclass(frozen=True)
class Finding:
    """One property of a method on one layout."""

    layout: str
    property: str
    state: State
    reason: str = ""


@dataclass(frozen=True)
class _Subject:
    """A method on a tiny model."""

    method: Method
    case: Case
    model: Any
    options: Mapping[str, Any]

    def patched(self, ratio: float | None, method: Method | None = None) -> Handle:
        budget = None if ratio is None else Budget("keep_ratio", ratio)
        return patch(self.model, MethodCall(method or self.method, budget), **self.options)

    @property
    def ratio(self) -> float | None:
        """A budget to run with, if the method takes any."""
        return None if self.method.unbudgeted else RATIOS[0]

    def logits(self, rows: Iterable[Row] = BATCH) -> Tensor:
        """(B, V) of the last token; prompts are padded on the left."""
        with torch.no_grad():
            found: Tensor = self.model(**self.case.inputs(tuple(rows))).logits[:, -1]
        return found

    def text(self) -> Tensor:
        """What is generated greedily, (B, L)."""
        inputs = self.case.inputs(BATCH)
        found: Tensor = self.model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return found

    @functools.cached_property
    def dense(self) -> tuple[Tensor, Tensor]:
        return self.logits(), self.text()


# --- The properties ----------------------------------------------------------------------------


def _declared(subject: _Subject) -> None:
    """Signals and cuts are there, and are the same whenever they are asked for."""
    method, shape = subject.method, subject.case.shape
    check_declared(method, shape)
    if method.needs(shape) != method.needs(shape):
        raise Broken(
            "needs() returns other signals every time: functions in a signal must be the same "
            "object (define them outside of needs())"
        )
    hash(method)


def _identity(subject: _Subject) -> None:
    """A full budget gives the bits of the unpatched model."""
    logits, text = subject.dense
    with subject.patched(1.0):
        found, written = subject.logits(), subject.text()
    if not torch.equal(written, text) or not torch.allclose(found, logits, atol=1e-5, rtol=0):
        worst = float((found - logits).abs().max())
        raise Broken(f"at keep_ratio=1.0 logits differ by up to {worst:.2g} from the dense model")


def _exact(subject: _Subject) -> None:
    """A budget is kept to the token."""
    if isinstance(subject.method, Attending):
        raise NotApplicable("what a step attends to is counted under `valid answers`")
    for ratio in RATIOS:
        with subject.patched(ratio) as handle:
            subject.logits()
            last = handle.last
        counts = subject.case.counts(BATCH)
        if isinstance(subject.method, Compressing):
            _exact_entries(handle.methods[0], last.entries, subject.case, last.text_tokens)
            continue
        if isinstance(subject.method, InEncoder) and subject.method.restores:
            family = family_of(subject.model)
            seen = family.pictures(family.call(IMAGE, subject.case.inputs(BATCH)))
            exact_rows(subject.method, subject.case.shape.tower, seen, last.encoder, ratio)
            continue
        wanted = [round_tokens(ratio, count) for count in counts]
        late = any(cut.adaptive for cut in subject.method.cuts(subject.case.shape))
        for found, keep in zip(last.tokens_kept, wanted, strict=True):
            if found != keep and not (late and found == 0):
                raise Broken(
                    f"keep_ratio={ratio} of {counts} tokens is {wanted}, and {last.tokens_kept} "
                    f"were kept"
                )


def _exact_entries(call: MethodCall, entries: Any, case: Case, text: list[int]) -> None:
    for layer in entries:
        for row, kept, words in zip(BATCH, layer, text, strict=True):
            wanted = entries_kept(call, case.counts([row]), words)
            if images([row]) and kept.shape[-1] != wanted:
                raise Broken(f"{call} is {wanted} entries, and {kept.shape[-1]} were kept")


def _published(subject: _Subject) -> None:
    """Without a budget the method runs by its own rule."""
    if subject.method.wants_budget:
        raise NotApplicable("it needs a budget")
    with subject.patched(None):
        if not torch.equal(subject.logits(), subject.logits()):
            raise Broken("two runs of one batch differ")
        subject.text()


def _alone(subject: _Subject) -> None:
    """A prompt gets the same choice and the same answer alone and in a padded batch."""
    with subject.patched(subject.ratio) as handle:
        together = subject.logits()
        kept = iter(_chosen(handle))
        for number, row in enumerate(BATCH):
            if not images([row]):
                continue
            logits = subject.logits([row])
            for image, found in enumerate(_chosen(handle)):
                if not same(next(kept), found):
                    raise Broken(f"of image {image} in prompt {row} others are kept in a batch")
            if not torch.allclose(logits[0], together[number], atol=1e-4, rtol=1e-3):
                worst = float((logits[0] - together[number]).abs().max())
                raise Broken(f"logits of prompt {row} differ by {worst:.2g} in a batch")


def _chosen(handle: Handle) -> list[Any]:
    """What was kept of each image, or of each prompt in every layer."""
    last = handle.last
    if not last.entries:
        return list(last.kept)
    prompts = zip(*last.entries, strict=True)
    return [list(layers) for layers in prompts if layers[0] is not None]


def _deterministic(subject: _Subject) -> None:
    """The same batch gives the same bits."""
    with subject.patched(subject.ratio) as handle:
        first, kept = subject.logits(), copied(_chosen(handle))
        if not torch.equal(subject.logits(), first) or not same(_chosen(handle), kept):
            raise Broken("two runs of one batch differ")


def _undone(subject: _Subject) -> None:
    """After remove() the model is as it was."""
    logits, text = subject.dense
    before = _traces(subject.model)
    subject.patched(subject.ratio).remove()
    if _traces(subject.model) != before:
        raise Broken("hooks or attributes stay on the model")
    if not torch.equal(subject.logits(), logits) or not torch.equal(subject.text(), text):
        raise Broken("the model answers otherwise than before it was patched")


def _traces(model: Any) -> list[tuple[int, int, int]]:
    return [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(vars(m))) for m in model.modules()
    ]


def _answers(subject: _Subject) -> None:
    """Every answer keeps the contract, number by number."""
    for _ in _questions(subject, debug=True):
        pass


def _pure(subject: _Subject) -> None:
    """Given tensors stay as they are, and the same question has the same answer."""
    for question in _questions(subject):
        before = copied(question.given)
        first = copied(question.ask(subject.method))
        if not same(question.given, before):
            raise Broken(f"{question.call} changes the tensors that it is given")
        if not same(question.ask(subject.method), first):
            raise Broken(f"{question.call} answers the same question in two ways")


def _each(subject: _Subject) -> None:
    """Of several pictures each has the answer that it has alone."""
    if isinstance(subject.method, InEncoder):
        for question in _questions(subject):
            pictures_alone(subject.method, question)
        return
    own = getattr(type(subject.method), "select_batch", None)
    if own is None or own is Choosing.select_batch:
        raise NotApplicable("it answers one by one")
    for question in _questions(subject):
        if question.call != "select_batch":
            continue
        (asked,) = question.given
        for one, found in zip(asked, question.ask(subject.method), strict=True):
            alone = Question("select_batch", ([one],)).ask(subject.method)[0]
            if not same([alone.kept, alone.order], [found.kept, found.order]):
                raise Broken("select_batch keeps others of an image than for it alone")


def _free(subject: _Subject) -> None:
    """A choice does not wait for the device."""
    if subject.method.waits:
        raise NotApplicable(f"it says that it waits: {subject.method.waits}")
    if isinstance(subject.method, Attending):
        raise NotApplicable("its budget is read on the CPU")
    for question in _questions(subject):
        if question.call == "select_adaptive":
            continue  # how many stay is in the tensors
        question.ask(subject.method)  # what depends on sizes alone is made once
        try:
            with no_waiting():
                question.ask(subject.method)
        except WaitsError as error:
            raise Broken(
                f"{question.call}: {error}; avoid it, or say why it must be in `waits`"
            ) from None


def _whole(subject: _Subject) -> None:
    """In the vision encoder: a new row is made of the row that it stands for, at least."""
    if not isinstance(subject.method, InEncoder):
        raise NotApplicable("it does not act in the vision encoder")
    for question in _questions(subject):
        rows_whole(subject.method, question)


def _questions(subject: _Subject, debug: bool = False) -> Iterator[Question]:
    """What the method is asked in a batch, by a budget and as published."""
    ratios = dict.fromkeys([subject.ratio, *([] if subject.method.wants_budget else [None])])
    for ratio in ratios:
        method, noted = listening(subject.method)
        options = {**subject.options, "debug": debug or looks_at_values(method, False)}
        budget = None if ratio is None else Budget("keep_ratio", ratio)
        with patch(subject.model, MethodCall(method, budget), **options):
            subject.text()
        yield from noted


PROPERTIES: dict[str, Callable[[_Subject], None]] = {
    "declared": _declared,
    "valid answers": _answers,
    "identity": _identity,
    "exact counts": _exact,
    "as published": _published,
    "alone as in a batch": _alone,
    "one by one": _each,
    "whole rows": _whole,
    "deterministic": _deterministic,
    "pure": _pure,
    "undo": _undone,
    "no host wait": _free,
}
"""By the word that stands for it in the listing; the docstring of each says what it means."""


def check(method: Method, layouts: Iterable[str] = LAYOUTS) -> Iterator[Finding]:
    """Every property on every layout, as it is found."""
    for layout in layouts:
        yield from _on_layout(method, CASES[layout])


def _on_layout(method: Method, case: Case) -> Iterator[Finding]:
    try:
        subject = _Subject(method, case, case.model(), _options(method, case))
        subject.patched(subject.ratio).remove()
    except (MissingSignalError, UnsupportedModelError, BudgetError) as error:
        lacks = not isinstance(error, MissingSignalError) or _lacks(method, case)
        state: State = "n/a" if lacks else "FAIL"
        yield Finding(case.name, "all", state, _sentence(error, method))
        return
    except Exception as error:
        yield Finding(case.name, "all", "FAIL", _sentence(error, method))
        return
    valid = True
    for name, holds in PROPERTIES.items():
        state, reason = "pass", ""
        try:
            holds(subject)
        except MethodAnswerError as error:
            state, reason = "FAIL", _sentence(error, method)
            if not valid:
                state, reason = "n/a", "an answer is not valid"
            valid = False
        except NotApplicable as error:
            state, reason = "n/a", str(error)
        except (BudgetError, UnsupportedFeatureError) as error:
            state, reason = "n/a", _sentence(error, method)
        except Exception as error:
            state, reason = "FAIL", _sentence(error, method)
        yield Finding(case.name, name, state, reason)


def _options(method: Method, case: Case) -> dict[str, Any]:
    """The text encoder, for methods that read it where there is one."""
    try:
        twin = any(getattr(need, "of_text_twin", False) for need in method.needs(case.shape))
    except Exception:  # `patch` says what is wrong
        return {}
    return {"clip": clip()} if twin and case.shape.tower.text_twin else {}


def _lacks(method: Method, case: Case) -> bool:
    """Whether the encoder of the model has not what the method reads."""
    try:
        return any(case.shape.lacks(need) for need in method.needs(case.shape))
    except MissingSignalError:
        return True
    except Exception:  # it is reported as it is
        return False


def _sentence(error: Exception, method: Method) -> str:
    """What went wrong, and where in the method's file if it does not say so itself."""
    text = " ".join(str(error).split())
    if isinstance(error, VlmpruneError | Broken):
        return text
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == type(method).__module__:
            place = f" ({Path(frame.f_code.co_filename).name}, line {line})"
    return f"{type(error).__name__}: {text}{place}"
