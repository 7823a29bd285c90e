"""Golden data: files, one call of a method, and where each method's runner is.

A file `<key>__<case>.npz` holds inputs and the results of the authors' own code. The test file of
a method, `prune/methods/test_<name>.py`, declares `GOLDEN = {key: Runner(...)}`: a runner builds
the method's inputs from a file, runs the method and compares. Only the files' own sizes and
settings are used, so that other cases of the same keys run as well.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from kit.paths import TESTS
from torch import Tensor
from vlmprune.prune.contract import (
    Choosing,
    Decoder,
    Method,
    ModelShape,
    Place,
    Selection,
    Signal,
    Tower,
    VisualTokens,
)
from vlmprune.prune.registry import method_class, method_names
from vlmprune.prune.tiling import Tiling

METHODS = TESTS / "prune" / "methods"
LLAMA_7B = Decoder(num_layers=32, hidden_size=4096, intermediate_size=11008)
CLIP_L = ModelShape(tower=Tower(num_layers=24, has_cls=True, text_twin=True), decoder=LLAMA_7B)
MERGING = ModelShape(
    tower=Tower(num_layers=32, has_cls=False, merge_unit=4),
    decoder=LLAMA_7B,
)


class Golden(NamedTuple):
    """One file: arrays as tensors, and its settings."""

    arrays: Mapping[str, Tensor]
    params: Mapping[str, Any]


class Runner(NamedTuple):
    """Which method a key belongs to, its fields from the settings, and the comparison.

    Where the authors' code has a defect that the method does not share, `official` is the method
    with that defect: the golden data compares it, and no model can be patched with it.
    """

    method: str
    fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    compare: Callable[[Golden, Any], None]
    official: type[Method] | None = None

    def made(self, golden: Golden) -> Method:
        return (self.official or method_class(self.method))(**self.fields(golden.params))


def load(path: Path) -> Golden:
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "params"}
        return Golden(arrays, json.loads(str(file["params"])))


def choose(
    method: Choosing,
    signals: Mapping[Signal, Tensor],
    keep: int | None,
    *,
    shape: ModelShape = CLIP_L,
    tiling: Tiling | None = None,
    layer: int = 0,
    alive: Tensor | None = None,
) -> Selection:
    """The method's selection (None: of as many tokens as it finds).

    The tokens are one square tile, or one row, unless given. In the decoder (`layer` > 0) the
    signals are those of the layers up to the cut.
    """
    wanted = [signal for signal in method.needs(shape) if not layer or signal in signals]
    if tiling is None:
        num_tokens = len(next(iter(signals.values())))
        side = math.isqrt(num_tokens)
        square = side * side == num_tokens
        tiling = Tiling.single(*((side, side) if square else (1, num_tokens)))
    tokens = VisualTokens(
        num_tokens=tiling.num_tokens,
        tiling=tiling,
        shape=shape,
        signals={signal: signals[signal] for signal in wanted},
        place=Place.DECODER if layer else Place.BEFORE_LLM,
        layer=layer,
        alive=alive,
    )
    return method.select_adaptive(tokens) if keep is None else method.select(tokens, keep)


def assert_equal(ours: Tensor, golden: Tensor) -> None:
    torch.testing.assert_close(ours, golden, rtol=0, atol=0)


@cache
def runners() -> dict[str, Runner]:
    """Every key and its runner: `GOLDEN` of the methods' own test files."""
    found: dict[str, Runner] = {}
    for name in method_names():
        path = METHODS / f"test_{name}.py"
        if path.exists():
            spec = spec_from_file_location(f"golden_of_{name}", path)
            assert spec is not None and spec.loader is not None
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            for key, runner in getattr(module, "GOLDEN", {}).items():
                assert key not in found, f"{path.name}: key {key!r} has a runner already"
                found[key] = runner
    return found


def run(path: Path) -> None:
    """Compare one golden file. A key without a runner is an error, not a skip."""
    key, known = path.name.partition("__")[0], runners()
    if key not in known:
        raise LookupError(f"{path.name}: no runner for key {key!r}; known: {', '.join(known)}")
    runner, golden = known[key], load(path)
    runner.compare(golden, runner.made(golden))
