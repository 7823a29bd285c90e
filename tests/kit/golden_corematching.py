"""Golden runners of CoreMatching."""

from __future__ import annotations

from typing import Any

from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from vlmprune.prune.contract import Neurons


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
        "corematching", lambda p: {"reference": "question", "official": True}, _corematching
    ),
}
