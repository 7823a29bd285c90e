"""What a method declares of itself is checked when a model is patched, before anything runs: its
cuts, and that every signal it names is there to be read, in time for a cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from numbers import Integral
from typing import NoReturn, get_args

from torch import Tensor

from . import contract
from .contract import (
    BeforeLLM,
    BlockCut,
    BlockInput,
    Choosing,
    ClsAttention,
    Compressing,
    Cut,
    HeadRank,
    Hidden,
    Images,
    InEncoder,
    Keys,
    LayerSignal,
    MeanHidden,
    Method,
    ModelShape,
    ModuleStep,
    Place,
    Pruning,
    ReceivedAttention,
    ReceivedInLayer,
    Signal,
    TextAttention,
    TextHidden,
    Tower,
)
from .errors import MethodFieldError, MissingSignalError

SIGNALS: dict[str, type[Signal]] = {
    name: kind
    for name, kind in vars(contract).items()
    if isinstance(kind, type) and issubclass(kind, Signal) and kind not in (Signal, LayerSignal)
}
"""All signals that can be read, by name."""
IN_ENCODER = (BlockInput, ClsAttention, HeadRank, Keys, ReceivedAttention)
"""Signals that a method inside the encoder can read of the block that is cut."""
Refuse = Callable[[str], NoReturn]


class Seen(dict[Signal, Tensor]):
    """The signals that a method is given; another one is an error that names these."""

    def __init__(self, method: Method, signals: Mapping[Signal, Tensor]) -> None:
        super().__init__(signals)
        self._name = method.name

    def __missing__(self, signal: object) -> NoReturn:
        raise MissingSignalError(
            f"{self._name} reads {signal}, which it is not given here. It is given: "
            f"{', '.join(map(str, self)) or 'no signal'}. Declare exactly what is read in needs(), "
            f"and read it at a cut behind its layer."
        )


def check_declared(method: Method, shape: ModelShape) -> None:
    """Refuse cuts that cannot be made and signals that cannot be read on a model of this shape.

    Signals that the encoder lacks (`ModelShape.lacks`) are another matter.

    Raises:
        MethodFieldError: of a cut.
        MissingSignalError: of a signal.
    """
    cuts = method.cuts(shape)
    _check_cuts(method, cuts, shape)
    needs = method.needs(shape)
    if not isinstance(needs, tuple):
        raise MissingSignalError(
            f"{method.name}.needs returned {needs!r}: return a tuple of signals, e.g. "
            f"(Features(),), or () for none."
        )
    for need in needs:
        _check_signal(method, need, cuts, shape)


def readable(signal: Signal, cut: Cut) -> bool:
    """Whether a method sees a signal at a cut: in the decoder the input of its layer is known,
    and what it would be asked ahead, but no more of it."""
    if not isinstance(signal, LayerSignal):
        return cut.place is Place.BEFORE_LLM
    if cut.place is Place.BEFORE_LLM:
        return False
    if getattr(signal, "ahead", False):
        return signal.layer == cut.layer
    if signal.layer == cut.layer:
        return isinstance(signal, Hidden | TextHidden | MeanHidden)
    return signal.layer < cut.layer


# --- Cuts --------------------------------------------------------------------------------------


def _check_cuts(method: Method, cuts: object, shape: ModelShape) -> None:
    def refuse(what: str, instead: str) -> NoReturn:
        raise MethodFieldError(f"{method.name}.cuts {what}: {instead}.")

    if not isinstance(cuts, tuple) or not all(isinstance(cut, Cut) for cut in cuts):
        refuse(f"returned {cuts!r}", "return a tuple of Cut, e.g. (Cut(Place.DECODER, 2),)")
    if not isinstance(method, Pruning):
        if cuts:
            refuse(f"returned {cuts!r}", "a method on the cache removes nothing from the sequence")
        return
    if isinstance(method, InEncoder):
        _check_blocks(method, shape.tower)
        if method.restores:
            return
    if not cuts:
        refuse("returned no cut", "return at least one, e.g. (Cut(Place.DECODER, 2),)")
    for cut in cuts:
        _check_layer_of(cut, shape.decoder.num_layers, refuse)
        if not isfinite(cut.share) or cut.share <= 0:
            refuse(f"has {cut}", "a share is a positive number, 1.0 for the last cut")
        if cut.images not in get_args(Images):
            refuse(f"has {cut}", f"images is one of {', '.join(map(repr, get_args(Images)))}")
        if cut.place is not Place.DECODER and cut.images != "each":
            refuse(f"has {cut}", "before the LLM every image is chosen from on its own")
        if cut.place is not Place.DECODER and cut.below:
            refuse(f"has {cut}", "no layer that stores tokens is below a cut before the LLM")
    depths = [cut.depth for cut in cuts]
    if depths != sorted(set(depths)):
        layers = ", ".join(str(cut.layer) for cut in cuts)
        refuse(f"has cuts at layers {layers}", "they must ascend, each once")
    if cuts[0].place is not method.place:
        refuse(
            f"begins {cuts[0].place.value}",
            f"it derives from a class of methods {method.place.value}, and its first cut must be "
            f"there: Cut(Place.{method.place.name}, ...); or derive from another class",
        )
    alone = method.finds_count or any(cut.adaptive for cut in cuts)
    if not isinstance(method, Choosing):
        return
    if alone and type(method).select_adaptive is Choosing.select_adaptive:
        why = "finds_count" if method.finds_count else "an adaptive cut"
        refuse(f"has {why} and no rule for it", "write select_adaptive(tokens)")


def _check_blocks(method: InEncoder, tower: Tower) -> None:
    """That a method inside the encoder cuts blocks that there are, in order, and that are read."""

    def refuse(what: str, instead: str) -> NoReturn:
        raise MethodFieldError(f"{method.name}.blocks {what}: {instead}.")

    cuts, depth = method.blocks(tower), tower.depth_read
    if not isinstance(cuts, tuple) or not cuts or not all(isinstance(c, BlockCut) for c in cuts):
        refuse(f"returned {cuts!r}", "return a tuple of BlockCut, at least one: (BlockCut(6),)")
    for cut in cuts:
        if not _whole(cut.block) or not 0 <= cut.block < depth or cut.at not in ("mlp", "block"):
            refuse(
                f"has {cut}",
                f"the projector reads blocks 0 to {depth - 1}, which are cut at 'mlp' or 'block'",
            )
        if tower.full_attention is not None and cut.block not in tower.full_attention:
            full = ", ".join(map(str, tower.full_attention))
            refuse(f"has {cut}", f"only blocks that see the whole picture can be cut: {full}")
    depths = [cut.depth for cut in cuts]
    if depths != sorted(set(depths)):
        refuse(f"has {cuts}", "cuts must ascend, each once")
    if method.restores and len(cuts) > 1:
        refuse(f"has {len(cuts)} cuts", "rows that are restored leave once")


def _check_layer_of(cut: Cut, depth: int, refuse: Callable[[str, str], NoReturn]) -> None:
    if cut.place is Place.CACHE:
        refuse(f"has {cut}", "a method on the cache removes nothing from the sequence")
    least, most = (1, depth - 1) if cut.place is Place.DECODER else (0, 0)
    if not _whole(cut.layer) or not least <= cut.layer <= most:
        refuse(
            f"has {cut}",
            f"the first decoder layer that sees fewer tokens is one of 1 to {depth - 1}; before "
            f"the LLM a cut has no layer: Cut(Place.BEFORE_LLM)",
        )


# --- Signals -----------------------------------------------------------------------------------


def _check_signal(method: Method, need: object, cuts: Sequence[Cut], shape: ModelShape) -> None:
    def refuse(what: str) -> NoReturn:
        raise MissingSignalError(f"{method.name} declares {need}, {what}.")

    if type(need) not in SIGNALS.values():
        refuse(
            f"which is none of the signals that can be read (use the classes themselves, with "
            f"brackets): {', '.join(sorted(SIGNALS))}"
        )
    assert isinstance(need, Signal)  # noqa: S101  (for the types)
    _check_words(need, refuse)
    inside = isinstance(need, LayerSignal)
    _check_layer(need, shape, inside, refuse)
    if isinstance(method, InEncoder):
        _check_in_encoder(method, need, shape.tower, refuse)
    elif type(need) in (BlockInput, HeadRank):
        refuse("which only methods inside the vision encoder can read: derive from InEncoder")
    elif not isinstance(method, Pruning):
        if not isinstance(method, Compressing):
            refuse("and a method that attends is given all it sees: return () from needs")
        if type(need) is not ReceivedInLayer:
            refuse(
                f"and acts {Place.CACHE.value}, where of signals only ReceivedInLayer is read: "
                f"CacheEntries holds the rest"
            )
    elif not inside and not isinstance(method, BeforeLLM):
        refuse(
            "which is read before the LLM, and all its cuts are in the decoder: derive from "
            "BeforeLLM, or declare signals of decoder layers (TextAttention, Hidden, ...)"
        )
    elif not any(readable(need, cut) for cut in cuts):
        refuse(_too_late(need, cuts))


def _check_in_encoder(method: InEncoder, need: Signal, tower: Tower, refuse: Refuse) -> None:
    if type(need) not in IN_ENCODER:
        names = ", ".join(kind.__name__ for kind in IN_ENCODER)
        refuse(f"and acts {Place.ENCODER.value}, where only these are read: {names}")
    blocks = [cut.block for cut in method.blocks(tower)]
    if need.layer not in blocks:  # type: ignore[attr-defined]
        listed = ", ".join(map(str, blocks))
        refuse(f"and only a block that is cut can be read, by its number: {listed}")


def _check_layer(need: Signal, shape: ModelShape, inside: bool, refuse: Refuse) -> None:
    """That the layer exists: of the decoder, counted from 0; of the encoder, also from its end."""
    layer = getattr(need, "layer", 0)
    if inside:
        depth = shape.decoder.num_layers
        least, what = 0, f"the decoder has layers 0 to {depth - 1}"
    else:
        depth = shape.tower.num_layers
        least = -depth
        what = f"the vision encoder has layers 0 to {depth - 1}, or {-depth} to -1"
    if not _whole(layer) or not least <= layer < depth:
        refuse(f"and {what}")


def _check_words(need: Signal, refuse: Refuse) -> None:
    """Fields of a signal that are words or functions."""
    rows = getattr(need, "rows", "last")
    wrong = None
    if not callable(rows) and rows not in ("last", "text", "image"):
        wrong = "rows is 'last', 'text', 'image', or a function of visual and text embeddings"
    elif isinstance(need, TextAttention) and need.heads not in ("mean", "max"):
        wrong = "heads is 'mean' or 'max'"
    elif isinstance(need, MeanHidden) and need.of not in ("query", "context"):
        wrong = "of is 'query' or 'context'"
    elif getattr(need, "part", "all") not in ("behind", "all"):
        wrong = "part is 'behind' or 'all'"
    elif isinstance(need, ModuleStep) and need.module not in ("attention", "mlp"):
        wrong = "module is 'attention' or 'mlp'"
    elif not callable(getattr(need, "read", len)):
        wrong = "read is a function"
    if wrong is not None:
        refuse(f"where {wrong}")


def _too_late(need: Signal, cuts: Sequence[Cut]) -> str:
    layers = [cut.layer for cut in cuts if cut.place is Place.DECODER]
    if not layers:
        return (
            "which is read in the decoder, and it cuts before the LLM: derive from InDecoder, or "
            "declare signals of the encoder (Features, ClsAttention, ...)"
        )
    if getattr(need, "ahead", False):
        listed = ", ".join(map(str, layers))
        return f"and only a layer that is cut can be read ahead: {listed}"
    last = max(layers)
    return (
        f"which lies behind its last cut: at Cut(Place.DECODER, {last}) layers 0 to {last - 1} "
        f"have run, and of layer {last} Hidden, MeanHidden and TextAttention(ahead=True) are known"
    )


def _whole(number: object) -> bool:
    return isinstance(number, Integral) and not isinstance(number, bool)
