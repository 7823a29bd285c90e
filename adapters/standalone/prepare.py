"""From what the caller typed to what calls of an image encoder run with."""

from __future__ import annotations

from ...prune.budget import MethodCall
from ...prune.contract import Decoder, ModelShape, Place
from ...prune.tiling import Tiling
from ..image_model import ImageModel
from ..patch_setup import Setup, Ticket
from ..places.handover import counts_of_image
from .checks import check_blocks, check_calls

_NO_LLM = Decoder(num_layers=0, hidden_size=0, intermediate_size=0)


def make_setup(model: ImageModel, calls: tuple[MethodCall, ...]) -> Setup:
    """What calls with this method run with, if the encoder allows it."""
    check_blocks(model)
    setup = _setup(model, calls)
    check_calls(calls, model, setup.shape)
    check_counts(setup, model)
    return setup


def _setup(model: ImageModel, calls: tuple[MethodCall, ...]) -> Setup:
    shape = ModelShape(tower=model.shape, decoder=_NO_LLM)
    return Setup(calls, shape, {Place.ENCODER: "original"}, None, Ticket())


def check_counts(setup: Setup, model: ImageModel) -> None:
    """Refuse a budget that no picture can have, where all have one size."""
    if (grid := model.fixed_grid) is not None:
        counts_of(setup, grid)


def counts_of(setup: Setup, grid: tuple[int, int]) -> tuple[int, ...] | None:
    """Rows alive after each cut of a picture; None: all of them stay."""
    total = grid[0] * grid[1]
    tiling = Tiling.single(*grid)
    _, counts = counts_of_image(setup.calls, setup.shape, tiling, [total], [grid])
    return None if counts is None or counts[0][-1] == total else counts[0]
