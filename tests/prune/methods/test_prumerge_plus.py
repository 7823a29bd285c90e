"""PruMerge+: the number that it finds itself."""

import pytest
import torch
from kit.golden import Runner
from kit.merging import check_prumerge, compare_prumerge, make, outliers
from vlmprune.prune.registry import method_class
from vlmprune.prune.tiling import Tiling

GOLDEN = {
    "prumergeplus": Runner(
        "prumerge_plus", lambda p: {"neighbours": p["k_neighbors"]}, compare_prumerge
    ),
}


@pytest.mark.parametrize("high", [1, 3, 6, 7, 12, 17])
def test_prumerge_plus_finds_its_own_number(high):
    """`high` of 72 tokens stand out: every (72 // high // 3)-th token is added, but the last."""
    chooser = method_class("prumerge_plus")(neighbours=4)
    tokens = make(chooser, Tiling.single(8, 9), seed=high)
    weights = next(iter(tokens.signals.values()))
    weights.copy_(torch.linspace(0.01, 0.011, 72))
    tall = torch.randperm(71, generator=torch.Generator().manual_seed(high))[:high]
    weights[tall] = torch.linspace(0.5, 0.9, high)
    assert outliers(weights) == high
    step = max(1, 72 // high // 3)
    attended = tall.flip(0).tolist()
    centres = attended + [i for i in range(0, 71, step) if i not in attended]
    check_prumerge(chooser, tokens, chooser.select_adaptive(tokens), centres)
