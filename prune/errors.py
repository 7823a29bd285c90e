"""The typed errors: each says what is wrong, what was received and what to type next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VlmpruneError(Exception):
    """Base of every error that vlmprune raises on purpose."""


class BudgetError(VlmpruneError, ValueError):
    """A budget that is missing, doubled, out of range or out of reach."""


class UnknownMethodError(VlmpruneError, KeyError):
    """A method name that no file registers."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0])


class PluginError(VlmpruneError, ImportError):
    """A method of another package that cannot be loaded."""


class MethodFieldError(VlmpruneError, TypeError):
    """A keyword that is neither a field of the method nor a budget, or a value it cannot take."""


class MethodAnswerError(VlmpruneError, ValueError):
    """What a method returned breaks the contract: not what, or not as much as, it was asked for."""


class UnsupportedModelError(VlmpruneError, TypeError):
    """A model that no adapter knows, or a state of it that cannot be patched."""


class MissingSignalError(VlmpruneError, ValueError):
    """A method asks for what this model does not compute, e.g. the attention of a CLS token."""


class UnsupportedFeatureError(VlmpruneError, NotImplementedError):
    """A feature of `generate()` or `forward()` that cannot be combined with pruning."""


class NothingToShowError(VlmpruneError, IndexError):
    """A picture of a part of `handle.last` that there is not: an image, a cut, a layer, scores."""


class NotRecordedError(VlmpruneError, RuntimeError):
    """Something is asked of `handle.last` that the patch was not told to keep."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The sentence that follows an unknown name: the nearest names, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    hint = f"Did you mean: {', '.join(near)}? " if near else ""
    return f"{hint}Available: {', '.join(names)}."
