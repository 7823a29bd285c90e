"""One method on one served model: what it needs, how many tokens it keeps, which ones.

Counts come from sizes alone, as vLLM lays out a prompt before anything is encoded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ...prune import scores
from ...prune.amount import BUDGET_WORDS, Budget
from ...prune.budget import MethodCall, plan
from ...prune.choose import ChosenImage, choose_images
from ...prune.contract import (
    AttentionToCls,
    ClsAttention,
    ClsAttentionOneHead,
    ClsFeatures,
    ClsLogits,
    EncoderFeatures,
    Features,
    Keys,
    ModelShape,
    Place,
    ReceivedAttention,
    Signal,
    TextEmbeddings,
)
from ...prune.errors import (
    BudgetError,
    MethodFieldError,
    MissingSignalError,
    UnsupportedFeatureError,
)
from ...prune.registry import method as make_call
from ...prune.tiling import Tiling

WORD = "vlmprune"
"""Of the configuration, of a request's `mm_processor_kwargs`, and before the field of counts."""
Options = Mapping[str, object]
"""`method`, its fields and its budget."""

OF_OUTPUT = (Features, EncoderFeatures, ClsFeatures)
"""Signals of what the encoder and the projector give."""
OF_ATTENTION = {
    ClsAttention: scores.cls_row,
    ClsLogits: scores.cls_logits,
    ClsAttentionOneHead: scores.cls_row_one_head,
    AttentionToCls: scores.to_cls,
    ReceivedAttention: scores.received,
    Keys: scores.keys,
}
"""Signals of an encoder layer's queries and keys, and what reads them."""
OF_PROMPT = (TextEmbeddings,)
"""Signals of the text that belongs to an image, which comes with it."""


def requested(options: Options, request: object) -> Options:
    """The options of a request: the server's, with the request's budget where it gives one.

    Raises:
        MethodFieldError, BudgetError: the request asks for more than another budget.
    """
    if request is None:
        return options
    if not isinstance(request, Mapping) or not request or set(request) - set(BUDGET_WORDS):
        raise MethodFieldError(
            f"{WORD}={request!r} in mm_processor_kwargs is not possible: a request may change the "
            f'budget alone, e.g. {{"{WORD}": {{"keep_ratio": 0.5}}}} with one of '
            f"{', '.join(BUDGET_WORDS)}. The method is the server's."
        )
    Budget.of(**request)
    return {**{k: v for k, v in options.items() if k not in BUDGET_WORDS}, **request}


@dataclass(frozen=True)
class Served:
    """A method that a server can run, for a model of these sizes."""

    call: MethodCall
    shape: ModelShape
    usual: Tiling
    one_size: bool

    @classmethod
    def of(cls, options: Options, shape: ModelShape, usual: Tiling, one_size: bool) -> Served:
        """From the server's or a request's options.

        Args:
            usual: how the tokens of a picture lie.
            one_size: whether those of every picture do.

        Raises:
            UnsupportedFeatureError: the method acts elsewhere, finds its own counts, or reads what
                a server cannot show it.
            MissingSignalError: it reads what the encoder does not have.
            UnknownMethodError, MethodFieldError, BudgetError: as of `vlmprune.method`.
        """
        name = options.get("method")
        if not isinstance(name, str):
            raise MethodFieldError(f'No method among {dict(options)!r}: give "method".')
        given = {word: value for word, value in options.items() if word != "method"}
        call = make_call(name, **given)
        _check_place(call, shape)
        _check_signals(call, shape)
        served = cls(call, shape, usual, one_size)
        served.keep(usual)  # a budget out of reach is an error now
        return served

    def keep(self, tiling: Tiling) -> int:
        """Tokens of an image that enter the LLM."""
        stages = plan(tiling.num_tokens, (self.call,), self.shape)
        return stages[-1].keep if stages else tiling.num_tokens

    @property
    def needs(self) -> tuple[Signal, ...]:
        return self.call.method.needs(self.shape)

    @property
    def asks(self) -> bool:
        """Whether the choice differs from question to question about the same image."""
        return any(need.of_prompt for need in self.needs)

    def choose(
        self, tiling: Tiling, signals: Mapping[Signal, Tensor], features: Tensor, keep: int
    ) -> ChosenImage:
        """The choice for one image.

        Args:
            signals: all of `needs`, of its tokens.
            features: (N, D), where the choice is to be.
            keep: of its request.
        """
        call = MethodCall(self.call.method, Budget("keep_tokens", keep))
        (image,) = choose_images(self.shape, [tiling], [signals], [(call,)], features.device)
        return image


_IN_ENCODER = (
    "its encoders have attention of their own, in which queries, keys and values come in one piece "
    "and nothing can be exchanged for what is left of the rows"
)
_IN_DECODER = "its scheduler and paged KV cache count all tokens of a prompt alike in all layers"


def _check_place(call: MethodCall, shape: ModelShape) -> None:
    method = call.method
    elsewhere = [place for place in method.places if place is not Place.BEFORE_LLM]
    if elsewhere or any(cut.layer for cut in method.cuts(shape)):
        place = (elsewhere or [Place.DECODER])[0]
        why = _IN_ENCODER if place is Place.ENCODER else _IN_DECODER
        raise UnsupportedFeatureError(
            f"{call.name} acts {place.value}, which vLLM cannot run: {why}. Use a method that acts "
            f"before the LLM alone, e.g. divprune."
        )
    if call.adaptive or any(cut.adaptive for cut in method.cuts(shape)):
        raise BudgetError(
            f"{call.name} finds its own number of tokens in each image, but vLLM lays out a prompt "
            f"before any image is encoded: give a budget, e.g. keep_ratio=0.25."
        )


def _check_signals(call: MethodCall, shape: ModelShape) -> None:
    for need in call.method.needs(shape):
        if need.of_text_twin:
            instead = [f"{field}={value!r}" for field, value in call.method.without_clip.items()]
            raise UnsupportedFeatureError(
                f"{call.name} reads {need}, but vLLM loads no text encoder of CLIP: "
                f"give {', '.join(instead) or 'another method, e.g. divprune'}."
            )
        if shape.lacks(need):
            raise MissingSignalError(
                f"{call.name} reads {need}, which this encoder does not have"
                + (": use scores='received'." if call.method.without_cls else ".")
            )
        if not isinstance(need, (*OF_OUTPUT, *OF_ATTENTION, *OF_PROMPT)):
            raise UnsupportedFeatureError(
                f"{call.name} reads {need}, which is not shown inside vLLM: use a method that "
                f"reads features or the encoder's attention, e.g. divprune or vtc_cls."
            )
        layer = getattr(need, "layer", None)
        if layer is not None and layer >= shape.tower.depth_read:
            raise UnsupportedFeatureError(
                f"{call.name} reads encoder layer {layer}, but vLLM builds only the "
                f"{shape.tower.depth_read} layers that the projector reads: give an earlier layer."
            )
