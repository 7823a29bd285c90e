"""`patch`, `unpatch` and the handle between them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from PIL import Image
from torch import nn

from ..prune.budget import BUDGET_WORDS, MethodCall, idle, plan
from ..prune.contract import (
    Attending,
    LayerSignal,
    Method,
    ModelShape,
    Place,
    Positions,
)
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
from .canvas import Fit
from .clip_text import ClipText
from .engine import Engine
from .family import Family
from .masks import layer_kind
from .registry import family_of
from .remember import Remembered
from .report import Last
from .showing import show
from .wrappers import patchable, unwrapped

_HANDLE = "_vlmprune_handle"


class Handle:
    """A patch on a model: what it did last, and the way to take it off.

    Also a context manager: `with vlmprune.patch(model, "divprune", keep_ratio=0.25) as h: ...`.
    """

    _engine: Engine

    def __init__(self, engine: Engine) -> None:
        object.__setattr__(self, "_engine", engine)

    def __setattr__(self, name: str, value: object) -> None:
        instead = f"handle.set({name}={value!r})" if name in BUDGET_WORDS else "handle.set(...)"
        raise AttributeError(
            f"A handle has no {name!r} to assign to: {instead} changes the budget or the method."
        )

    @property
    def methods(self) -> tuple[MethodCall, ...]:
        """The methods in effect, in order of depth, with their budgets."""
        return self._engine.setup.calls

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
        image: Image.Image | Sequence[Image.Image],
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
        """
        return show(
            self.last,
            [image] if isinstance(image, Image.Image) else image,
            index,
            fit=fit or self._engine.family.fit,
            stage=stage,
            layer=layer,
            scores=scores,
            across=across,
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
        """Take the patch off; the model is then as it was before. A second call does nothing."""
        if self._engine.setup.ticket.active:
            self._engine.remove()
            self._engine.model.__dict__.pop(_HANDLE, None)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "active" if self.active else "removed"
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
            attention implementation. A model that is patched already is unpatched first. What
            wraps one is patched inside: PEFT's models, DistributedDataParallel, FSDP, pipelines.
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
    model = patchable(model)
    family = family_of(model)
    calls = _calls(method, fields_and_budget)
    shape = family.shape(model)
    for call in calls:
        _check_signals(call, shape, clip)
        if getattr(call.method, "official", False):
            raise MethodFieldError(
                f"{call.name}(official=True) reproduces a defect of the published code on golden "
                f"data and may keep a wrong number of tokens: leave it out to prune a model."
            )
        _check_decoder(call, family, model)
    modes = _positions(family, calls, positions)
    _refuse_compiled(model, family)
    if (tokens := family.fixed_tokens(model)) is not None:
        plan(tokens, calls, shape)  # a budget out of reach is an error now, not at the first image
    if clip is not None:
        _check_clip(clip, family, model)
    remember_images = plain(remember_images)
    _check_memory(remember_images, calls, shape)
    if not isinstance(debug, bool):
        raise MethodFieldError(
            f"debug={debug!r}: use True to look at all numbers that a method returns, or False."
        )
    if not isinstance(record, bool):
        raise MethodFieldError(
            f"record={record!r}: use True to keep the scores of tokens, or False."
        )
    for said in idle(calls):
        warnings.warn(said, UserWarning, stacklevel=2)
    unpatch(model)
    engine = Engine(model, family, calls, modes, clip, remember_images, record, debug)
    handle = Handle(engine)
    model.__dict__[_HANDLE] = handle
    return handle


def unpatch(model: nn.Module) -> None:
    """Take the patch off a model; a model without one is left alone."""
    handle = unwrapped(model).__dict__.get(_HANDLE)
    if handle is not None:
        handle.remove()


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
    listed = [method] if isinstance(method, MethodCall) else list(method)
    if not listed:
        raise MethodFieldError("An empty list of methods: name at least one of vlmprune.methods().")
    calls = [make_call(one) if isinstance(one, str) else one for one in listed]
    for call in calls:
        if not isinstance(call, MethodCall):
            raise MethodFieldError(
                f"{call!r} is no method: give a name, vlmprune.method(...), or a list of these."
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
        field = next((f for f in ("scores", "pivot") if f in call.method.fields()), None)
        instead = (
            f"Set {field}='received' to use the mean attention that each token receives instead, "
            f"or use a method that works on it: "
            if field
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
    width = family.vision_tower(model).config.hidden_size
    if clip.vision_width != width:
        raise UnsupportedModelError(
            f"clip= belongs to a vision tower of width {clip.vision_width}, and this model's is "
            f"{width} wide: load the CLIP checkpoint that the model's tower comes from."
        )


def _check_decoder(call: MethodCall, family: Family, model: nn.Module) -> None:
    """Refuse a decoder whose modules a method inside it cannot read."""
    text: Any = family.text_model(model)
    needs = call.method.needs(family.shape(model))
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
        for part in (model, family.core(model), family.text_model(model))
    ]
    if "_compiled_call" in model.__dict__ or any(call is not None for call in compiled):
        raise UnsupportedModelError(
            "This model is compiled already, and compiled code would ignore the hooks: patch the "
            "freshly loaded model first, then compile it."
        )
