"""Golden runners of CoreMatching."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from torch import Tensor
from vlmprune.prune.contract import ModelShape, Neurons, Signal
from vlmprune.prune.methods.decoder.corematching import CoreMatching


@dataclass(frozen=True, kw_only=True)
class OfficialCoreMatching(CoreMatching):
    """All active neurons of a token, compared with those of the fifth text token from the end."""

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        return (Neurons(self._layer(shape), shared_with_question),)


def shared_with_question(visual: Tensor, text: Tensor) -> Tensor:
    asked = text[max(-5, -len(text))] > 0
    return (visual > 0).float() @ asked.float()


def _corematching(golden: Golden, method: Any) -> None:
    activations, params = golden.arrays["act"], golden.params
    visual = slice(params["image_start"], params["image_start"] + params["n_image"])
    (neurons,) = method.needs(CLIP_L)
    assert isinstance(neurons, Neurons)
    overlap = neurons.read(activations[visual], activations[visual.stop :])
    assert_equal(overlap, golden.arrays["overlap"])
    kept = choose(method, {neurons: overlap}, None, layer=neurons.layer + 1).kept
    assert_equal(kept, golden.arrays["kept"])


RUNNERS: dict[str, Runner] = {
    "corematching": Runner(
        "corematching", lambda p: {"reference": "question"}, _corematching, OfficialCoreMatching
    ),
}
