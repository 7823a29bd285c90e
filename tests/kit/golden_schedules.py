"""Golden runners of methods with a schedule of cuts in the decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from torch import Tensor
from vlmprune.prune.contract import Method, ModuleStep, Signal, TextAttention


def _text_attention(golden: Golden, queries: Tensor, keys: Tensor, alive: Tensor) -> Tensor:
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


def _compare_stages(
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


def _pyramiddrop(golden: Golden, method: Method) -> None:
    def signals(stage: int, layer: int, alive: Tensor) -> Mapping[Signal, Tensor]:
        query, keys = golden.arrays[f"q_last_{stage}"][:, None], golden.arrays[f"k_{stage}"]
        row = _text_attention(golden, query, keys, alive)
        return {TextAttention(layer, rows="last", ahead=True): row}

    _compare_stages(golden, method, signals)


def _transprune(golden: Golden, method: Method) -> None:
    # A file numbers layers from 1, and has one row for both modules of a layer.
    rows = {
        layer - 1: row[golden.params["image_start"] :] / 2
        for layer, row in zip(
            golden.params["accumulating_layers_1based"], golden.arrays["ttv"], strict=True
        )
    }

    def signals(stage: int, layer: int, alive: Tensor) -> Mapping[Signal, Tensor]:
        queries, keys = golden.arrays[f"q_text_{stage}"], golden.arrays[f"k_{stage}"]
        seen: dict[Signal, Tensor] = {
            step: rows[step.layer][alive] for step in _steps(method) if step.layer < layer
        }
        read = _text_attention(golden, queries, keys, alive)
        return seen | {TextAttention(layer, rows="text", ahead=True): read}

    _compare_stages(golden, method, signals)


def _transprune_ttv(golden: Golden, method: Method) -> None:
    arrays, first = golden.arrays, _steps(method)[0].layer
    inputs = {"attention": ("attn_in", "attn_out"), "mlp": ("ffn_in", "ffn_out")}
    ttv = sum(
        step.read(*(arrays[name] for name in inputs[step.module]))
        for step in _steps(method)
        if step.layer == first
    )
    torch.testing.assert_close(ttv, arrays["ttv"], rtol=1e-4, atol=1e-8)


def _steps(method: Method) -> list[ModuleStep]:
    return [signal for signal in method.needs(CLIP_L) if isinstance(signal, ModuleStep)]


RUNNERS: dict[str, Runner] = {
    "pdrop": Runner(
        "pyramiddrop",
        lambda p: {"layers": tuple(p["layers_1based"]), "ratios": tuple(p["ratios"])},
        _pyramiddrop,
    ),
    "transprune": Runner(
        "transprune", lambda p: {"layers": tuple(p["pruning_layers_1based"])}, _transprune
    ),
    "transprune_ttv": Runner("transprune", lambda p: {}, _transprune_ttv),
}
