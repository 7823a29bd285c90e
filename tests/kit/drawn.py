"""Images of random signals: what a method that chooses tokens may see, on any tiling and depth."""

from dataclasses import fields, replace

import torch
from vlmprune.adapters.signals.draw import Sizes
from vlmprune.adapters.signals.table import SOURCES
from vlmprune.prune.contract import (
    Choosing,
    Cut,
    Decoder,
    MeanHidden,
    ModelShape,
    Place,
    Selection,
    Tower,
    VisualTokens,
)
from vlmprune.prune.declared import readable
from vlmprune.prune.registry import method_class, method_names
from vlmprune.prune.tiling import Block, Tiling

NAMES = [name for name in method_names() if issubclass(method_class(name), Choosing)]
"""Methods that choose tokens."""
DECODER = Decoder(num_layers=32, hidden_size=64, intermediate_size=128)
TOWERS = {
    "clip": Tower(num_layers=24, has_cls=True),
    "no cls": Tower(num_layers=27, has_cls=False),
    "merging": Tower(num_layers=32, has_cls=False, merge_unit=4, full_attention=(7, 15, 23, 31)),
    "tiny": Tower(num_layers=2, has_cls=True),
    "one layer": Tower(num_layers=1, has_cls=True),
}
SHAPE = ModelShape(tower=TOWERS["clip"], decoder=DECODER)


def choices() -> list[str]:
    """Where every method chooses a given number: its name, with "@" and the layer for a cut in the
    decoder; of many cuts the first three and the last."""
    found = []
    for name in NAMES:
        cuts = [cut.layer for cut in method_class(name)().cuts(SHAPE) if not cut.adaptive]
        for layer in sorted({*cuts[:3], *cuts[-1:]}):
            found.append(f"{name}@{layer}" if layer else name)
    return found


def at(choice: str) -> tuple[Choosing, int]:
    """The method of a choice, and the layer."""
    name, _, layer = choice.partition("@")
    return method_class(name)(), int(layer or 0)


CHOICES = choices()
THUMBNAIL = Block((4,), (4,))
TILINGS = {
    "plain, newline": Tiling((Block((4,), (5,), "end"),)),
    "2 x 2": Tiling((THUMBNAIL, Block((4, 4), (4, 4), "rows"))),
    "2 x 2, uneven": Tiling((THUMBNAIL, Block((1, 3), (2, 4), "rows"))),
    "1 x 3, one gone": Tiling((THUMBNAIL, Block((4,), (4, 2, 0), "rows"))),
    "3 x 1": Tiling((THUMBNAIL, Block((4, 4, 2), (3,), "rows"))),
    "video": Tiling((Block((3,), (2,)), Block((3,), (2,)), Block((3,), (2,), "end"))),
}


def shape_of(tower: str = "clip", depth: int = DECODER.num_layers) -> ModelShape:
    return ModelShape(tower=TOWERS[tower], decoder=replace(DECODER, num_layers=depth))


def make_tokens(
    method,
    tiling,
    *,
    layer: int = 0,
    seed: int = 0,
    tower: str = "clip",
    depth: int = DECODER.num_layers,
    constant: bool = False,
) -> VisualTokens:
    """What `method` may see of an image, which is a `Tiling` or the size of its grid, at a cut."""
    if isinstance(tiling, tuple):
        tiling = Tiling.single(*tiling)
    shape = shape_of(tower, depth)
    num_tokens = tiling.num_tokens
    candidates = num_tokens
    if not layer and method.newline_policy != "compete":
        candidates = tiling.num_patches
    generator = torch.Generator().manual_seed(seed)
    cut = Cut(Place.DECODER if layer else Place.BEFORE_LLM, layer)
    signals = {}
    for signal in method.needs(shape):
        if not readable(signal, cut):
            continue
        count = len(tiling.tiles) if signal.per == "tile" else candidates
        drawn = SOURCES[type(signal)].draw(signal, count, Sizes(), generator)
        one = isinstance(signal, MeanHidden)  # a vector, no rows
        if constant and drawn.dim() and not one:  # all tokens alike
            drawn = drawn[:1].expand_as(drawn).clone()
        signals[signal] = drawn
    alive = None
    if layer:  # some tokens of a larger image are gone already, and the last row stands for none
        alive = torch.arange(num_tokens) * 2
        alive[-1] = -1
        tiling = Tiling.single(2, num_tokens)
    return VisualTokens(
        num_tokens=num_tokens,
        tiling=tiling,
        shape=shape,
        signals=signals,
        alive=alive,
        place=Place.DECODER if layer else Place.BEFORE_LLM,
        layer=layer,
    )


def same(one: Selection, two: Selection) -> bool:
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in fields(Selection)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def select(name: str, tokens: VisualTokens, keep: int, **given_fields) -> torch.Tensor:
    return method_class(name)(**given_fields).select(tokens, keep).kept
