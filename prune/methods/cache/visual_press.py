"""Visual press: eviction rules that were made for text, applied to the visual entries alone.

Reference: no paper of its own. The rules, by the name of `press`: "snapkv", SnapKV: LLM Knows What
    You are Looking for Before Generation, NeurIPS 2024, arXiv 2404.14469. "knorm", A Simple and
    Effective L2 Norm-Based Strategy for KV Cache Compression, EMNLP 2024, arXiv 2406.11430.
    "received", H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language
    Models, NeurIPS 2023, arXiv 2306.14048.
Upstream: none of its own. SnapKV's default widths are those of FasterDecoding/SnapKV,
    snapkv/monkeypatch/snapkv_utils.py, commit 395b54dce7866cb2cffdebdc9f641fd0821a2c30. Objects
    follow ScorerPress of NVIDIA/kvpress, kvpress/presses/scorer_press.py, commit
    0603dec4626985bc8c2b05a268ee4a3f4193a0b3.
Differs: text entries always stay, and rank among nobody. Every prompt is compressed, whatever its
    length, and every layer alike (L2 norm: not the first two).
    SnapKV asks the text behind the last visual entry, `window` rows of it at most: visual entries
    are not part of the window, which would always stay. Text next to a visual entry counts as
    nothing in the pooling. Query heads that share keys are averaged, as in kvpress.
    H2O's sums are averaged over heads, its recent entries are the text's, and nothing is evicted
    after prefill. Scores are float32, ties go to the lower index.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, get_args

import torch
from torch import Tensor

from ...contract import (
    CacheEntries,
    Compressed,
    Compressing,
    ModelShape,
    Positions,
    ReceivedInLayer,
    Signal,
)
from ...errors import BudgetError, MethodFieldError, did_you_mean
from ...fields import check_choice, check_int
from ...ops.topk import ascending, top_k
from ...presses import Pooling, Press, observed, received, scores_of, small_keys
from ...registry import register

_NAMES = ("snapkv", "knorm", "received")
_OBJECT = "or give a press of kvpress, an object with score(module, hidden_states, keys, ...)"


@register("visual_press")
@dataclass(frozen=True, kw_only=True)
class VisualPress(Compressing):
    """Every key head keeps the visual entries that `press` scores highest in it.

    `press` is a name (snapkv, knorm, received) or an object that scores as kvpress's presses do;
    its own compression ratio is not used. `window`, `kernel` and `pooling` are those of snapkv.
    """

    positions: ClassVar[Positions] = "original"
    waits: ClassVar[str | None] = "how many entries are text decides how many others stay"
    # Presses of kvpress compare by value, so that they have no hash.
    press: str | Press = field(default="snapkv", hash=False)
    window: int = 32
    kernel: int = 5
    pooling: Pooling = "avg"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_press(self.press)
        hint = "give the number of last rows that are asked, at least 1"
        check_int("window", self.window, at_least=1, hint=hint)
        hint = "give an odd number of neighbours (1 for none)"
        check_int("kernel", self.kernel, at_least=1, hint=hint)
        if self.kernel % 2 == 0:
            raise MethodFieldError(f"kernel={self.kernel} is not possible: {hint}.")
        check_choice("pooling", self.pooling, get_args(Pooling))

    def fields(self) -> dict[str, object]:
        named = self.press if isinstance(self.press, str) else type(self.press).__name__
        return super().fields() | {"press": named}

    def needs(self, shape: ModelShape) -> tuple[Signal, ...]:
        if self.press != "received":
            return ()
        return tuple(ReceivedInLayer(layer) for layer in shape.decoder.attending)

    def compress(self, entries: CacheEntries, keep: int) -> Compressed:
        visual = int(entries.visual.sum())  # forces a wait: counts depend on which are visual
        text = len(entries.visual) - visual
        if keep <= text:
            raise BudgetError(
                f"{self.name} keeps all {text} text entries of a prompt, which leaves nothing of "
                f"{keep} entries. The least that can is {text + 1}: give a higher budget."
            )
        numbers = entries.visual.to(torch.uint8).argsort(stable=True)
        of_text, of_image = numbers.split([text, visual])
        scores = self._scores(entries)
        best = of_image[top_k(scores[:, of_image], keep - text)]
        kept = ascending(torch.cat([of_text.expand(len(best), -1), best], 1))
        return Compressed(kept=kept, scores=scores)

    def _scores(self, entries: CacheEntries) -> Tensor:
        """(H_kv, S), of which those of visual entries are compared."""
        if not isinstance(self.press, str):
            return scores_of(self.press, entries)
        if self.press == "knorm":
            return small_keys(entries)
        if self.press == "received":
            return received(entries)
        return observed(entries, self.window, self.kernel, self.pooling)


def _check_press(press: object) -> None:
    """Refuse unknown names, and objects that do not score."""
    if isinstance(press, str):
        if press not in _NAMES:
            raise MethodFieldError(
                f"press={press!r} is not known. {did_you_mean(press, _NAMES)[:-1]}; {_OBJECT}."
            )
    elif isinstance(press, type) or not callable(getattr(press, "score", None)):
        raise MethodFieldError(
            f"press={press!r} does not score: use {', '.join(_NAMES)}; {_OBJECT}"
            f"{' (the object, not its class)' if isinstance(press, type) else ''}."
        )
