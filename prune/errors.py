"""The typed errors: each says what is wrong, what was received and what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmpruneError(Exception):
    """Base of every error that vlmprune raises on purpose; catch it to catch them all.

    `help(vlmprune.BudgetError)` says of one when it comes, why, and what to type instead; all of
    them are in ERRORS.md, which is beside this package's `__init__.py`.
    """


class BudgetError(VlmpruneError, ValueError):
    """A budget that is missing, doubled, out of range or out of reach.

    Symptom: `patch`, `method`, `handle.set` or `--budgets` stop before anything runs; a list of
        budgets stops the call whose images it does not fit.
    Cause: there is not exactly one of the four budgets, it is not in its range, or the method has
        no knob that reaches it (`average_tokens` below what its early layers see, say).
    Type: one of `keep_ratio=0.25`, `keep_tokens=64`, `average_tokens=128`, `flops_ratio=0.3`; the
        message says the nearest that can be reached.
    Page: ERRORS.md#budgeterror
    """


class UnknownMethodError(VlmpruneError, KeyError):
    """A method name that no file registers.

    Symptom: the name is in no list; near ones are in the message.
    Cause: a spelling, or a method of your own whose file was not imported.
    Type: `vlmprune methods` for all names; `--import mine.py` on the command line, or `import
        mine` in Python, for your own.
    Page: ERRORS.md#unknownmethoderror
    """

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class PluginError(VlmpruneError, ImportError):
    """A method or model family of another package or file that cannot be loaded.

    Symptom: it is listed with its error, or `--import` stops; everything else works.
    Cause: the package or file raises when it is imported, is not there, or registers no method.
    Type: `python -c "import THE_MODULE"` to see the whole error; repair it, or
        `pip uninstall THE_PACKAGE`.
    Page: ERRORS.md#pluginerror
    """


class MethodFieldError(VlmpruneError, TypeError):
    """A keyword that is neither a field of the method nor a budget, or a value it cannot take.

    Symptom: a method, `patch`, an option of `handle.overlay` or a word such as
        `fastv:layer=2` is refused before anything runs.
    Cause: a misspelt field, a value outside its range, or two that exclude each other.
    Type: `vlmprune methods NAME` for the fields of a method, what they mean and their values.
    Page: ERRORS.md#methodfielderror
    """


class MethodAnswerError(VlmpruneError, ValueError):
    """What a method returned breaks the contract: not what, or not as much as, it was asked for.

    Symptom: a forward stops at the choice, and the message names the method, the rule and the
        value; shipped methods do not raise it.
    Cause: `select`, `compress` or another function of an own method returns too many tokens,
        repeated or unsorted ones, a tensor of another type, ...
    Type: `vlmprune check-method ./mine.py` to see on tiny models what else it breaks.
    Page: ERRORS.md#methodanswererror
    """


class UnsupportedModelError(VlmpruneError, TypeError):
    """A model that no adapter knows, or a state of it that cannot be patched.

    Symptom: `patch` or `unpatch` refuse the model, or a handle is not of its patch any more.
    Cause: another family, code that is compiled already, a decoder of other modules or of fewer
        layers than the method cuts, a handle that a later patch has replaced.
    Type: `vlmprune models` for the families; patch first, compile afterwards; the message says
        which methods work.
    Page: ERRORS.md#unsupportedmodelerror
    """


class MissingSignalError(VlmpruneError, ValueError):
    """A method asks for what this model does not compute, e.g. the attention of a CLS token.

    Symptom: `patch` refuses a method on one model that runs on another.
    Cause: the encoder has no CLS token (SigLIP, Qwen), or no text encoder of its own space.
    Type: `scores="received"` where the message offers it, `clip=` with a `vlmprune.ClipText` for
        methods that compare image and question, or one of the methods that the message names;
        `vlmprune methods NAME` says which models a method runs on.
    Page: ERRORS.md#missingsignalerror
    """


class UnsupportedFeatureError(VlmpruneError, NotImplementedError):
    """A feature of `generate()` or `forward()` that cannot be combined with pruning.

    Symptom: a call on a patched model is refused before its first token.
    Cause: its result could not be that of the shortened prompt (a 4-D mask, prefill in chunks,
        continuous batching; with methods inside the LLM also assisted decoding), or its inputs do
        not belong together.
    Type: what the message says to leave out, or `with handle.disabled():` around the call to make
        it dense.
    Page: ERRORS.md#unsupportedfeatureerror
    """


class NothingToShowError(VlmpruneError, IndexError):
    """A picture of a part of `handle.last` that there is not: an image, a cut, a layer, scores.

    Symptom: `handle.overlay` refuses, and the forward before it worked.
    Cause: `index`, `stage` or `layer` counts further than the last prefill, or the method ranks no
        tokens.
    Type: `handle.last.kept` for the images and `handle.last.stages` for the cuts that there are.
    Page: ERRORS.md#nothingtoshowerror
    """


class NotRecordedError(VlmpruneError, RuntimeError):
    """Something is asked of `handle.last` that the patch was not told to keep.

    Symptom: `handle.last.scores` or `overlay(scores=True)` after a forward that worked.
    Cause: scores are kept only on demand, as they take memory.
    Type: `patch(..., record=True)`, and run the forward again.
    Page: ERRORS.md#notrecordederror
    """


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The sentence that follows an unknown name: the nearest names, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    hint = f"Did you mean: {', '.join(near)}? " if near else ""
    return f"{hint}Available: {', '.join(names)}."
