"""Patched models with methods at every place, and what they must compute: the bench on which
features of `forward` and `generate` are checked."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import vlmprune
from kit import skips, zoo
from kit.oracle import Truth
from kit.reported import Noted, cached_truth, truth_of
from vlmprune.prune.budget import Budget, MethodCall
from vlmprune.prune.contract import Place

TWO_PLACES = [
    vlmprune.method("divprune", keep_ratio=0.5),
    vlmprune.method("fastv", keep_ratio=0.25, layer=2),
]
ELASTIC = vlmprune.method("elastic_cache", keep_ratio=0.15, distance=-4)
"""Evicts entries from the second new token on."""
PRESS = vlmprune.method("visual_press", keep_ratio=0.2)
SELECT = MethodCall(method=Noted(n_init=2, n_local=3), budget=Budget("keep_ratio", 0.2))
PLACES = {
    "in the encoder": [vlmprune.method("tome", keep_ratio=0.4)],
    "before the LLM": [vlmprune.method("divprune", keep_ratio=0.4)],
    "in the decoder": [vlmprune.method("pyramiddrop", keep_ratio=0.2)],
    "on the cache": [ELASTIC],
    "all": [*TWO_PLACES, ELASTIC],
}
MOVED = {
    "in the encoder": [vlmprune.method("evit", keep_ratio=0.4)],
    "before the LLM": [vlmprune.method("visionzip", keep_ratio=0.4, scores="cls")],
    "in the decoder": [vlmprune.method("sparsevlm", keep_ratio=0.2)],
    "on the cache": [PRESS],
    "all": [vlmprune.method("visionzip", keep_ratio=0.5, scores="cls"), TWO_PLACES[1], PRESS],
}
"""The same places with rows that are merged, moved, or no token (CLS of every tile)."""
MERGED = {
    "in the encoder": PLACES["in the encoder"],
    "before the LLM": [vlmprune.method("pool", keep_ratio=0.4)],
    "in the decoder": MOVED["in the decoder"],
    "on the cache": [SELECT],
    "all": [vlmprune.method("pool", keep_ratio=0.5), TWO_PLACES[1], SELECT],
}
"""The same places with rows that are merged."""
STATES = {**PLACES, "in the decoder": [vlmprune.method("fastv", keep_ratio=0.4)]}
"""The same places where the layers that others read keep a state."""
CALLS = {
    **{case.name: STATES for case in zoo.CASES.values() if case not in zoo.STORING_CASES},
    zoo.THREE_NAMES[-1]: MOVED,
    **dict.fromkeys(zoo.SHARING_NAMES[1:], MERGED),
}
STEPS = 3
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@dataclass
class Bench:
    """One patched model, and what it must compute."""

    case: zoo.Case
    place: str
    plain: bool = False
    """Whether tokens must enter as they are."""
    rows: tuple[zoo.Row, ...] = zoo.BATCH
    instead: Sequence[MethodCall] = ()
    """Methods in place of those of the place."""

    @property
    def calls(self):
        if self.instead:
            return self.instead
        if self.place == "all" and not self.case.whole_cache:
            return TWO_PLACES
        return (PLACES if self.plain else CALLS.get(self.case.name, PLACES))[self.place]

    @functools.cached_property
    def model(self):
        return self.case.model()

    @functools.cached_property
    def handle(self):
        return vlmprune.patch(self.model, self.calls)

    @property
    def reference(self):
        return self.case.reference()

    def prefill(self, rows=None) -> tuple[dict, Truth]:
        """Inputs, and the truth for the tokens that the patched model keeps of them."""
        inputs = self.case.inputs(rows or self.rows)
        _ = self.handle
        with torch.no_grad():
            self.model(**inputs)
        return inputs, self.truth(inputs)

    def truth(self, inputs: dict) -> Truth:
        if self.handle.methods[-1].method.place is Place.CACHE:
            return cached_truth(self.case, inputs, self.model, self.handle)
        assert self.handle.last.stages
        return truth_of(self.case, inputs, self.model, self.handle)

    def generate(self, inputs: dict, **options):
        options = {"max_new_tokens": STEPS, "do_sample": False, **options}
        return self.model.generate(**inputs, **options)

    def upstream(self, call: Callable):
        """Run the call on the unpatched model; where that fails, there is nothing to hold."""
        try:
            return call(self.reference)
        except Exception as error:
            skips.skip("fails unpatched", f"{type(error).__name__}: {str(error)[:80]}")

    def positions(self, inputs: dict) -> dict:
        """Explicit positions where the model cannot work them out from embeddings."""
        if not self.case.packed:
            return {}
        mask = inputs["attention_mask"]
        grids = {k: inputs[k] for k in ("image_grid_thw", "video_grid_thw") if k in inputs}
        index, _ = self.reference.model.get_rope_index(
            inputs["input_ids"], inputs["mm_token_type_ids"], attention_mask=mask, **grids
        )
        text = (mask.cumsum(-1) - 1).clamp_min(0)
        return {"position_ids": torch.cat([text[None], index])}


def check_tokens(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.equal(found[:, -expected.shape[1] :], expected)


def check_greedy(
    out, truth: Truth, steps: int = STEPS, given=None, pieces: Sequence[int] = ()
) -> None:
    """Tokens and the logits of every step; `pieces`: how many tokens were fed at once."""
    truth.pieces = pieces
    before = [[]] * len(truth.rows) if given is None else given.tolist()
    tokens = out.sequences[:, -steps:]
    # Along the tokens that were found: if all logits agree, so does every choice.
    rows = zip(before, tokens.tolist(), strict=True)
    logits = torch.stack(
        [truth.next_logits(b, [*x, *new[:-1]])[-steps:] for b, (x, new) in enumerate(rows)], 1
    )
    torch.testing.assert_close(torch.stack(out.logits), logits, **CLOSE)
    assert torch.equal(logits.argmax(-1).T, tokens)


ONE_BY_ONE = (1,) * (STEPS - 1)
"""Tokens of a turn of generate(), whose last one is fed with the next turn."""
DETAILS = {"return_dict_in_generate": True, "output_logits": True}
Features = dict[str, Callable[[Bench], None]]
"""Checks by the names of features."""


def register(features: Features, name: str):
    """Decorates the check of a feature: it becomes one of `features`."""

    def add(function):
        features[name] = function
        return function

    return add
