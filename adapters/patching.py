"""`patch`, `unpatch` and the handle between them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any

from PIL import Image
from torch import nn

from ..prune.budget import BUDGET_WORDS, MethodCall, idle, plan
from ..prune.contract import Attending, LayerSignal, Method, ModelShape, Place, Positions
from ..prune.declared import check_declared
from ..prune.errors import (
    BudgetError,
    MethodFieldError,
    MissingSignalError,
    UnsupportedFeatureError,
    UnsupportedModelError,
)
from ..prune.numbers import plain
from ..prune.registry import default_methods, method_class
from ..prune.registry import method as make_call
from .budgets import Budgets
from .clip_text import ClipText
from .engine import Engine
from .family import Family
from .patch_setup import Setup, Ticket
from .pictures.canvas import Fit
from .pictures.show import show
from .registry import family_of
from .remember import Remembered
from .report import Last
from .sequence.masks import layer_kind
from .wrappers import patchable, unwrapped

_HANDLE = "_vlmprune_handle"


class Handle:
    """A patch on a model: what it did last, and the way to take it off.

    Also a context manager: `with vlmprune.patch(model, "divprune", keep_ratio=0.25) as h: ...`.
    """

    _engine: Engine
    _positions: Positions | None
    """As given to `patch`."""
    _outer: Handle | None
    """Whose patch comes back when this one's `with` ends."""
    _entered: bool
    _suspended: bool
    """Whether another patch is on the model meanwhile."""

    def __init__(self, engine: Engine, positions: Positions | None, outer: Handle | None) -> None:
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
        """What the last prefill of the calling thread did; decoding, and going on in text, changes
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
            fit=fit or self._engine.family.fit,
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
            engine.exchange(budgets.check(now, self._fixed_tokens))
            return
        made = _setup(
            engine.model,
            engine.family,
            _calls(method, fields_and_budget),
            positions or self._positions,
            clip or now.clip,
            0 if engine.memory is None else engine.memory.capacity,
        )
        made = replace(made, ticket=now.ticket, record=now.record, debug=now.debug)
        if (made.standing, made.passing) != (now.standing, now.passing):
            _refuse_compiled(engine.model, engine.family)
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
        budgets.check(self._engine.setup, self._fixed_tokens)
        return self._engine.wishing(budgets)

    def disabled(self) -> AbstractContextManager[None]:
        """Calls that this thread begins within it run on all tokens, as without a patch. A cache
        that was pruned goes on as it is. A `budget()` inside it prunes again."""
        self._require_active()
        return self._engine.wishing("dense")

    @property
    def _fixed_tokens(self) -> int | None:
        return self._engine.family.fixed_tokens

    def _require_active(self) -> None:
        if self.active:
            return
        instead = self._engine.model.__dict__.get(_HANDLE)
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
            self._engine.model.__dict__.pop(_HANDLE, None)

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
            self._engine.model.__dict__[_HANDLE] = self
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
        if self._outer is not None and _HANDLE not in self._engine.model.__dict__:
            self._outer._resume()

    def __repr__(self) -> str:
        state = "active" if self.active else "suspended" if self._suspended else "removed"
        return f"<vlmprune.Handle {', '.join(map(str, self.methods))} ({state})>"


def patch(
    model: nn.Module,
    method: str | MethodCall | Sequence[str | MethodCall],
    *,
    positions: Positions | None = None,
    clip: ClipText | None = None,
    remember_images: int = 0,
    record: bool = False,
    debug: bool = False,
    **fields_and_budget: object,
) -> Handle:
    """Make a loaded vision-language model answer on fewer visual tokens, in place.

    Args:
        model: a `...ForConditionalGeneration` of a family in `models()`, on any device, with any
            attention implementation. A patch that is on it already makes room for the new one: it
            comes back where the new one's `with` ends, and not after its `remove()`. What wraps a
            model is patched inside: PEFT's, DistributedDataParallel, FSDP, pipelines.
        method: a name of `methods()`, a `method(...)`, or a list of these that act at different
            places.
        positions: position ids after a cut: `original` keeps those that the tokens came with
            (with gaps), `repacked` renumbers 0..n-1 from there on; for a method on the cache, those
            of the tokens that are decoded. Default: every method does what its paper does; models
            with M-RoPE always keep the original ones.
        clip: the text encoder of the model's CLIP vision tower, for methods that compare the two.
        remember_images: how many images (or videos) to remember, those asked about last: in the
            next prompt with one of them, neither the vision encoder nor the choice before the LLM
            runs for it. For `forward` and `generate`, while no gradients flow through the encoder.
            What older weights made is not used. Not for methods whose choice before the LLM reads
            the prompt.
        record: keep the scores by which methods rank tokens, for `handle.last.scores` and
            `handle.overlay(image, scores=True)`.
        debug: look at every number that a method returns, which waits for the device. What methods
            that are not shipped return is looked at in any case.
        **fields_and_budget: exactly one of `keep_ratio`, `keep_tokens`, `average_tokens`,
            `flops_ratio`, and fields of the method. Only with a single name.

    Returns:
        A handle: `.last` tells what happened, `.remove()` undoes it.

    Raises:
        UnsupportedModelError, UnknownMethodError, MethodFieldError, BudgetError,
        MissingSignalError, UnsupportedFeatureError: each says what to type instead.
    """
    if not isinstance(debug, bool):
        raise MethodFieldError(
            f"debug={debug!r}: use True to look at all numbers that a method returns, or False."
        )
    if not isinstance(record, bool):
        raise MethodFieldError(
            f"record={record!r}: use True to keep the scores of tokens, or False."
        )
    model, remember_images = patchable(model), plain(remember_images)
    family = family_of(model)
    _refuse_compiled(model, family)
    setup = _setup(
        model, family, _calls(method, fields_and_budget), positions, clip, remember_images
    )
    setup = replace(setup, record=record, debug=debug)
    outer: Handle | None = model.__dict__.get(_HANDLE)
    if outer is not None:
        outer._suspend()
    try:
        handle = Handle(Engine(model, family, setup, remember_images), positions, outer)
    except BaseException:
        if outer is not None:
            outer._resume()
        raise
    model.__dict__[_HANDLE] = handle
    return handle


def _setup(
    model: nn.Module,
    family: Family,
    calls: tuple[MethodCall, ...],
    positions: Positions | None,
    clip: ClipText | None,
    remember_images: int,
) -> Setup:
    """What calls with these methods run with, if the model allows them."""
    shape = family.shape
    for call in calls:
        _check_signals(call, shape, clip)
        _check_decoder(call, family, model)
    modes = _positions(family, calls, positions)
    if (tokens := family.fixed_tokens) is not None:
        plan(tokens, calls, shape)  # a budget out of reach is an error now, not at the first image
    if clip is not None:
        _check_clip(clip, family, model)
    _check_memory(remember_images, calls, shape)
    for said in idle(calls):
        warnings.warn(said, UserWarning, stacklevel=3)
    return Setup(calls, shape, modes, family.text_model, Ticket(), clip=clip)


def unpatch(model: nn.Module) -> None:
    """Take the patch off a model; a model without one is left alone.

    Raises:
        UnsupportedModelError: it is no model.
    """
    inner = unwrapped(model)
    if not isinstance(inner, nn.Module):
        raise UnsupportedModelError(
            f"unpatch takes the model that was patched, not {type(model).__name__}: "
            f"vlmprune.unpatch(model), or handle.remove()."
        )
    handle = inner.__dict__.get(_HANDLE)
    if handle is not None:
        handle.remove()


@contextmanager
def unpatched(model: nn.Module) -> Iterator[None]:
    """The model without its patch, which is back afterwards."""
    outer: Handle | None = unwrapped(model).__dict__.get(_HANDLE)
    if outer is not None:
        outer._suspend()
    try:
        yield
    finally:
        unpatch(model)
        if outer is not None:
            outer._resume()


def _calls(
    method: str | MethodCall | Sequence[str | MethodCall], given: dict[str, object]
) -> tuple[MethodCall, ...]:
    """The methods to run, ordered by depth."""
    if isinstance(method, str):
        return (make_call(method, **given),)
    if given:
        raise (BudgetError if any(k in BUDGET_WORDS for k in given) else MethodFieldError)(
            f"{', '.join(given)} cannot be given beside a method object or a list: put them "
            f'inside, e.g. vlmprune.method("divprune", keep_ratio=0.5).'
        )
    listed = list(method) if isinstance(method, Iterable) else [method]
    if not listed:
        raise MethodFieldError("An empty list of methods: name at least one of vlmprune.methods().")
    calls = [make_call(one) if isinstance(one, str) else one for one in listed]
    for call in calls:
        if not isinstance(call, MethodCall):
            raise MethodFieldError(
                f"{call!r} is no method: give a name, vlmprune.method(...), or a list of these; "
                f"a budget with its word, e.g. keep_ratio=0.25."
            )
    for place in Place:
        same = [call.name for call in calls if place in call.method.places]
        if len(same) > 1:
            raise MethodFieldError(
                f"{' and '.join(same)} all act {place.value}: combine methods that act at "
                f"different places, e.g. one before the LLM and one in the decoder."
            )
    return tuple(sorted(calls, key=lambda call: list(Place).index(call.method.place)))


def _check_signals(call: MethodCall, shape: ModelShape, clip: ClipText | None) -> None:
    """Refuse a method whose signal the model does not compute, naming those that work."""
    check_declared(call.method, shape)
    needs = call.method.needs(shape)
    missing = [need for need in needs if shape.lacks(need)]
    if any(need.of_cls for need in missing):
        settings = ", ".join(f"{k}={v!r}" for k, v in call.method.without_cls.items())
        instead = (
            f"Set {settings} to use the mean attention that each token receives instead, "
            f"or use a method that works on it: "
            if settings
            else "Methods that work on it: "
        )
        raise MissingSignalError(
            f"{call.name} reads the CLS token, which this vision tower does not have. "
            f"{instead}{', '.join(_working(shape))}."
        )
    if missing:
        raise MissingSignalError(
            f"{call.name} compares image and question in the space of a CLIP text encoder, which "
            f"this vision tower was not trained with. Methods that work on it: "
            f"{', '.join(_working(shape))}."
        )
    if clip is None and any(need.of_text_twin for need in needs):
        raise MissingSignalError(
            f"{call.name} compares image and question in CLIP's space, and needs the text encoder "
            f"of the checkpoint that the vision tower comes from: pass clip=vlmprune.ClipText."
            f'from_pretrained("openai/clip-vit-large-patch14-336", processor).'
        )


def _working(shape: ModelShape) -> list[str]:
    """Methods that find all their signals on a model, as they are by default."""
    return [name for name, made in default_methods()[0].items() if _finds_all(made, shape)]


def _finds_all(made: Method, shape: ModelShape) -> bool:
    try:
        return not any(shape.lacks(need) for need in made.needs(shape))
    except Exception:  # it has no rule for this shape, or is somebody's own and broken
        return False


def _check_memory(images: object, calls: tuple[MethodCall, ...], shape: ModelShape) -> None:
    """Refuse to remember images with a method that chooses anew for every question."""
    if isinstance(images, bool) or not isinstance(images, int) or images < 0:
        raise MethodFieldError(
            f"remember_images={images!r}: give the number of images to remember, e.g. "
            f"remember_images=16, or 0 to remember none."
        )
    for call in calls if images else ():
        read = [need for need in call.method.needs(shape) if need.of_prompt]
        if read:
            free = [
                name
                for name in _working(shape)
                if not any(need.of_prompt for need in method_class(name)().needs(shape))
            ]
            raise UnsupportedFeatureError(
                f"remember_images={images} does not go with {call.name}, which chooses tokens anew "
                f"for every question, from {read[0]}: leave remember_images out, or use a method "
                f"that does not read the prompt before the LLM: {', '.join(free)}."
            )


def _check_clip(clip: ClipText, family: Family, model: nn.Module) -> None:
    width = family.vision_tower.config.hidden_size
    if clip.vision_width != width:
        raise UnsupportedModelError(
            f"clip= belongs to a vision tower of width {clip.vision_width}, and this model's is "
            f"{width} wide: load the CLIP checkpoint that the model's tower comes from."
        )


def _check_decoder(call: MethodCall, family: Family, model: nn.Module) -> None:
    """Refuse a decoder whose modules a method inside it cannot read."""
    text: Any = family.text_model
    needs = call.method.needs(family.shape)
    inside = any(isinstance(need, LayerSignal) for need in needs)
    if inside or call.method.place is Place.CACHE:
        for path in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "input_layernorm"):
            try:
                text.layers[0].get_submodule(path)
            except AttributeError:
                raise UnsupportedModelError(
                    f"{call.name} reaches into decoder layers by the names of Llama's modules, and "
                    f"{type(text).__name__} has no {path}: use a method that acts before the LLM."
                ) from None
    if call.method.place is not Place.CACHE:
        return
    kinds = {layer_kind(text.config, layer) for layer in range(text.config.num_hidden_layers)}
    if kinds != {"full_attention"}:
        raise UnsupportedModelError(
            f"{call.name} works on the KV cache of layers that see the whole prompt, and this "
            f"decoder has {', '.join(sorted(kinds))}: use a method that acts before the LLM or in "
            f"the decoder."
        )
    if isinstance(call.method, Attending) and "flex" in (text.config._attn_implementation or ""):
        raise UnsupportedModelError(
            f"{call.name} exchanges the keys of a decoding step, which the block masks of flex "
            f'attention do not allow: call model.set_attn_implementation("sdpa") first.'
        )


def _positions(
    family: Family, calls: tuple[MethodCall, ...], wanted: Positions | None
) -> dict[Place, Positions]:
    """The mode at every place where a method acts."""
    if wanted not in (None, "original", "repacked"):
        raise MethodFieldError(f'positions={wanted!r} is unknown: use "original" or "repacked".')
    if family.mrope and wanted == "repacked":
        raise MethodFieldError(
            f'positions="repacked" has no meaning for {family.name}, whose rotary positions '
            f'have several axes (M-RoPE): leave positions out or use "original".'
        )
    own: Positions | None = "original" if family.mrope else wanted
    return {place: own or call.method.positions for call in calls for place in call.method.places}


def _refuse_compiled(model: nn.Module, family: Family) -> None:
    compiled: list[Any] = [
        getattr(part, "_compiled_call_impl", None)
        for part in (model, family.core, family.text_model)
    ]
    if "_compiled_call" in model.__dict__ or any(call is not None for call in compiled):
        raise UnsupportedModelError(
            "This model is compiled already, and compiled code would ignore the hooks: patch the "
            "freshly loaded model first, then compile it."
        )
