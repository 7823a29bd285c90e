"""The handle of a patch: what it did, and the way to change it and to take it off."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from types import TracebackType

from PIL import Image

from ..prune.budget import BUDGET_WORDS, MethodCall
from ..prune.contract import Positions
from ..prune.errors import (
    BudgetError,
    MethodFieldError,
    UnsupportedModelError,
)
from .budgets import Budgets
from .clip_text import ClipText
from .family import Fit
from .installed import Installed
from .pictures.show import show
from .prepare import calls_of
from .remember import Remembered
from .report import Last

HANDLE = "_vlmprune_handle"
"""Attribute of a patched model."""


class Handle:
    """A patch on a model: what it did last, and the way to take it off.

    Also a context manager: `with vlmprune.patch(model, "divprune", keep_ratio=0.25) as h: ...`.
    """

    _engine: Installed
    _positions: Positions | None
    """As given to `patch`."""
    _outer: Handle | None
    """Whose patch comes back when this one's `with` ends."""
    _entered: bool
    _suspended: bool
    """Whether another patch is on the model meanwhile."""

    def __init__(
        self, engine: Installed, positions: Positions | None, outer: Handle | None
    ) -> None:
        own = {"_engine": engine, "_positions": positions, "_outer": outer}
        self.__dict__.update(own, _entered=False, _suspended=False)

    def __setattr__(self, name: str, value: object) -> None:
        instead = f"handle.set({name}={value!r})" if name in BUDGET_WORDS else "handle.set(...)"
        raise AttributeError(
            f"A handle has no {name!r} to assign to: {instead} changes the budget or the method."
        )

    @property
    def methods(self) -> tuple[MethodCall, ...]:
        """The methods in effect for calls of this thread, in order of depth, with their budgets;
        none inside `disabled()`."""
        setup = self._engine.wanted()
        return () if setup is None else setup.calls

    @property
    def positions(self) -> Positions:
        """`original` or `repacked`: the mode of the first method; `last.stages` has each cut's."""
        return self._engine.setup.reported_positions

    @property
    def active(self) -> bool:
        """Whether the patch is still on the model."""
        return self._engine.setup.ticket.active

    @property
    def unread_layers(self) -> int:
        """Layers at the end of the vision encoder that `forward` and `generate` do not run, because
        neither the projector nor a method reads them."""
        return self._engine.unread_layers

    @property
    def last(self) -> Last:
        """What the last prefill of the calling thread did, or the last pass of an image encoder
        without an LLM; decoding, and going on in text, changes
        nothing. Without visual tokens `last.note` says so, and there are no images.

        `generate(return_dict_in_generate=True)` returns it too, as `output.vlmprune_last` (None
        where it only went on in text on a cache), for other threads than the one that ran.

        Raises:
            RuntimeError: the patched model has not run in this thread yet.
        """
        if (last := self._engine.last) is None:
            raise RuntimeError(
                "Nothing to report yet: run the patched model on an image first, in this thread. "
                "Another thread's is in the output of its generate(..., "
                "return_dict_in_generate=True), as output.vlmprune_last."
            )
        return last

    def overlay(
        self,
        image: Image.Image | list[Image.Image] | tuple[Image.Image, ...],
        index: int = 0,
        *,
        fit: Fit | None = None,
        stage: int | None = None,
        layer: int | None = None,
        scores: bool = False,
        across: int | None = None,
    ) -> Image.Image:
        """A picture of what was kept of image `index` of the last prefill.

        Dropped tokens are grey, and kept ones in colour with a fine white line. Tokens that were
        merged are a region with an outline, in whose colour the row that they became has a box.
        After a method on the KV cache, a heat map of how many layers still store each token.

        Args:
            image: the picture that was asked about; for a video, a list of its frames.
            index: its place among the images of the batch.
            fit: how the processor brought the picture to the model's shape: `crop` (centre, as
                CLIP processors do; it is framed) or `stretch`. Default: as the family's do.
            stage: what was alive after this cut, by its number in `last.stages`. Default: the last.
            layer: what a method on the cache left in this decoder layer.
            scores: a heat map of the numbers by which the tokens were ranked, with its scale; the
                patch was made with `record=True`.
            across: panels (tiles, frames) beside each other. Default: all.

        Raises:
            NothingToShowError: there is no such image, cut or layer, or the method has no scores.
            NotRecordedError: scores were not recorded.
            MethodFieldError: `image` is not a picture, but the name of one, say.
        """
        return show(
            self.last,
            image if isinstance(image, (list, tuple)) else [image],
            index,
            fit=fit or self._engine.fit,
            stage=stage,
            layer=layer,
            scores=scores,
            across=across,
        )

    def set(
        self,
        method: str | MethodCall | Sequence[str | MethodCall] | None = None,
        *,
        positions: Positions | None = None,
        clip: ClipText | None = None,
        **fields_and_budget: object,
    ) -> None:
        """Change the budget, `handle.set(keep_ratio=0.25)`, or the method,
        `handle.set("fastv", keep_tokens=64)`, for all threads.

        Calls that begin afterwards run with it. A `forward` or `generate` under way ends as it
        began, and a cache goes on with what pruned it; a new image in it is pruned anew.

        Args:
            method, **fields_and_budget: as `vlmprune.patch` takes them; without a method, one
                budget of the only method that there is.
            positions, clip: with a method; default: those given to `vlmprune.patch`.

        Raises:
            Whatever `vlmprune.patch` raises; nothing has changed then.
            UnsupportedModelError: the model was compiled, and the method needs other hooks.
        """
        engine, now = self._engine, self._engine.setup
        self._require_active()
        if method is None:
            if positions is not None or clip is not None:
                raise MethodFieldError(
                    "positions= and clip= belong to a method: name it too, e.g. "
                    'handle.set("divprune", keep_ratio=0.25, positions="original").'
                )
            budgets = Budgets.of(**fields_and_budget)
            if budgets.per_image:
                raise BudgetError(
                    "A list gives the images of one call their budgets: use it for a request, "
                    "with handle.budget(keep_tokens=[64, None]): ..."
                )
            engine.exchange(engine.check(budgets))
            return
        made = engine.planned(
            calls_of(method, fields_and_budget), positions or self._positions, clip or now.clip
        )
        made = replace(made, ticket=now.ticket, record=now.record, debug=now.debug)
        if (made.standing, made.passing) != (now.standing, now.passing):
            engine.refuse_compiled()
        engine.exchange(made)

    def budget(self, **budget: object) -> AbstractContextManager[None]:
        """Another budget for the calls that this thread begins within it:
        `with handle.budget(keep_tokens=64): model.generate(**inputs)`.

        A list gives each image of the call its own, over the batch in order (images first, then
        videos), None keeps one whole: `handle.budget(keep_tokens=[64, None])`.

        Raises:
            BudgetError: the method cannot reach it, or there are several methods. A list of another
                length than the call has images is refused by the call.
        """
        self._require_active()
        budgets = Budgets.of(**budget)
        self._engine.check(budgets)
        return self._engine.wishing(budgets)

    def disabled(self) -> AbstractContextManager[None]:
        """Calls that this thread begins within it run on all tokens, as without a patch. A cache
        that was pruned goes on as it is. A `budget()` inside it prunes again."""
        self._require_active()
        return self._engine.wishing("dense")

    def _require_active(self) -> None:
        if self.active:
            return
        instead = self._engine.model.__dict__.get(HANDLE)
        raise UnsupportedModelError(
            f"This patch is not on the model any more: {self!r}. "
            + (
                f"{instead!r} is in its place: use that handle."
                if instead is not None
                else "Patch the model again, with vlmprune.patch(model, ...)."
            )
        )

    @property
    def remembered(self) -> Remembered:
        """What `remember_images` did: images in memory, and how often one was found there."""
        memory = self._engine.memory
        return Remembered() if memory is None else memory.remembered

    def forget_images(self) -> None:
        """Empty the memory of images. Needed where weights changed behind PyTorch's count of
        changes: through `weight.data`, or of tensors that were made in inference mode."""
        if self._engine.memory is not None:
            self._engine.memory.forget()

    def remove(self) -> None:
        """Take the patch off; the model is then without any. A second call does nothing.

        A patch that this one replaced comes back only where `with` ends.
        """
        self.__dict__["_suspended"] = False
        if self.active:
            self._engine.remove()
            self._engine.model.__dict__.pop(HANDLE, None)

    def _suspend(self) -> None:
        """Make room for another patch."""
        self.remove()
        self.__dict__["_suspended"] = True
        if not self._entered:
            self.__dict__["_outer"] = None

    def _resume(self) -> None:
        """Come back, unless somebody removed this patch meanwhile."""
        if self._suspended:
            self._engine.put_back()
            self._engine.model.__dict__[HANDLE] = self
            self.__dict__["_suspended"] = False

    def __enter__(self) -> Handle:
        self.__dict__["_entered"] = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()
        if self._outer is not None and HANDLE not in self._engine.model.__dict__:
            self._outer._resume()

    def __repr__(self) -> str:
        state = "active" if self.active else "suspended" if self._suspended else "removed"
        return f"<vlmprune.Handle {', '.join(map(str, self.methods))} ({state})>"
