"""`patch` and `unpatch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from torch import nn

from ..prune.budget import MethodCall
from ..prune.contract import Positions
from ..prune.errors import (
    MethodFieldError,
    UnsupportedModelError,
)
from ..prune.numbers import plain
from .checks.patches import refuse_compiled
from .clip_text import ClipText
from .engine import Engine
from .handle import HANDLE, Handle
from .image_models import image_model_of
from .installed import Installed
from .patch_setup import Setup
from .prepare import calls_of, make_setup
from .registry import family_of
from .standalone.checks import refuse_llm_options
from .standalone.engine import ImageEngine
from .standalone.prepare import make_setup as make_image_setup
from .wrappers import patchable, unwrapped


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
            attention implementation; or an image encoder without an LLM (`VisionTransformer` or
            `Eva` of timm, CLIP, SigLIP, DINOv2 or ViT of transformers), for methods that act inside
            it. A patch that is on it already makes room for the new one: it comes back where the
            new one's `with` ends, and not after its `remove()`. What wraps a model is patched
            inside: PEFT's, DistributedDataParallel, FSDP, pipelines.
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
    _refuse_patched_parts(model)
    given = method, fields_and_budget

    def made(setup: Setup) -> Setup:
        return replace(setup, record=record, debug=debug)

    install: Callable[[], Installed]
    if (images := image_model_of(model)) is not None:
        refuse_llm_options(positions, clip, remember_images)
        refuse_compiled(model, images.tower)
        setup = made(make_image_setup(images, calls_of(*given)))
        install = partial(ImageEngine, images, setup)
    else:
        family = family_of(model)
        refuse_compiled(model, family.core, family.text_model)
        setup = made(make_setup(model, family, calls_of(*given), positions, clip, remember_images))
        install = partial(Engine, model, family, setup, remember_images)
    outer: Handle | None = model.__dict__.get(HANDLE)
    if outer is not None:
        outer._suspend()
    try:
        handle = Handle(install(), positions, outer)
    except BaseException:
        if outer is not None:
            outer._resume()
        raise
    model.__dict__[HANDLE] = handle
    return handle


def _refuse_patched_parts(model: nn.Module) -> None:
    """Refuse a model whose encoder was patched as a model of its own: rows would leave twice."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else ():
        if path and HANDLE in module.__dict__:
            raise UnsupportedModelError(
                f"{path} of this model is patched itself, with {module.__dict__[HANDLE]!r}: take "
                f"that patch off first, vlmprune.unpatch(model.{path})."
            )


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
    handle = inner.__dict__.get(HANDLE)
    if handle is not None:
        handle.remove()


@contextmanager
def unpatched(model: nn.Module) -> Iterator[None]:
    """The model without its patch, which is back afterwards."""
    outer: Handle | None = unwrapped(model).__dict__.get(HANDLE)
    if outer is not None:
        outer._suspend()
    try:
        yield
    finally:
        unpatch(model)
        if outer is not None:
            outer._resume()
