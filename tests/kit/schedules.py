"""What golden runners and tests of schedules share."""

import math
from collections.abc import Callable, Mapping

import torch
from kit.golden import CLIP_L, Golden, assert_equal, choose
from torch import Tensor
from vlmprune.prune.contract import Method, Signal


def text_attention(golden: Golden, queries: Tensor, keys: Tensor, alive: Tensor) -> Tensor:
    """Attention that text tokens give to the alive visual ones, mean over heads and rows: (N,).

    Args:
        queries: (H, R, d) of the prompt's last R tokens.
        keys: (H, L, d) of all original tokens.
        alive: (N,) original numbers.
    """
    start, num_visual = golden.params["image_start"], golden.params["n_image"]
    text = torch.arange(start + num_visual, keys.shape[1])
    keys = keys[:, torch.cat([torch.arange(start), start + alive, text])].float()
    logits = queries.float() @ keys.transpose(1, 2) / math.sqrt(keys.shape[-1])
    rows, columns = logits.shape[1:]
    later = torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows + 1)
    attention = logits.masked_fill(later, -torch.inf).softmax(-1)
    return attention.mean((0, 1))[start : start + len(alive)]


def compare_stages(
    golden: Golden,
    method: Method,
    signals: Callable[[int, int, Tensor], Mapping[Signal, Tensor]],
) -> None:
    """Stage after stage. `signals` gives those of (stage, cut's layer, tokens alive there)."""
    arrays, alive = golden.arrays, torch.arange(golden.params["n_image"])
    for stage, cut in enumerate(method.cuts(CLIP_L)):
        keep = golden.params["keep_counts"][stage]
        seen = signals(stage, cut.layer, alive)
        chosen = choose(method, seen, keep, shape=CLIP_L, layer=cut.layer, alive=alive)
        alive = alive[chosen.kept]
        assert_equal(alive, arrays[f"kept_{stage}"])
    assert_equal(alive, arrays["kept"])
