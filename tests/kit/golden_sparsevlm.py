"""Golden runners of SparseVLM."""

from __future__ import annotations

import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from torch import Tensor
from vlmprune.prune.contract import Hidden, Method, RotaryAffinity, Selection, TextAttention
from vlmprune.prune.methods.decoder.sparsevlm import raters
from vlmprune.prune.ops.clusters import merged_clusters


def _close(ours: Tensor, golden: Tensor) -> None:
    torch.testing.assert_close(ours, golden, rtol=1e-4, atol=1e-5)


def _raters(golden: Golden) -> Tensor:
    """Numbers of the raters among the text behind the image, compared."""
    start, num_visual = golden.params["image_start"], golden.params["n_image"]
    _, visual, text = golden.arrays["emb"].tensor_split([start, start + num_visual])
    found = raters(visual, text).nonzero()[:, 0]
    assert_equal(found, golden.arrays["rater_idx"])
    return found


def _cut_layers(golden: Golden, method: Method) -> list[int]:
    layers = [cut.layer for cut in method.cuts(CLIP_L)]
    assert layers == [layer + 1 for layer in golden.params["layers_0based"]]
    return layers


def _count(kept: int, num_visual: int) -> int:
    """Rows of a stage that keeps so many tokens: the merged ones are counted as officially."""
    recycled = int(0.3 * (num_visual - kept)) + 1
    return kept + recycled // 10 + 1


def _entering(chosen: Selection, hidden: Tensor) -> Tensor:
    """The hidden states (K, D) of the rows, from those of all tokens (N, D)."""
    if chosen.order is None:
        return hidden[chosen.kept]
    rows = hidden[chosen.order]
    assert chosen.features is not None
    rows[chosen.rows] = chosen.features
    return rows


def _sparsevlm(golden: Golden, method: Method) -> None:
    arrays, start = golden.arrays, golden.params["image_start"]
    found = _raters(golden)
    assert method.positions == "repacked"
    sequence, certain = arrays["emb"], True
    for stage, layer in enumerate(_cut_layers(golden, method)):
        # What the official noise may have changed, its own result replaces.
        attention = arrays[f"attn_{stage}"][:, found].mean((0, 1))
        num_visual = len(attention)
        keep = _count(min(golden.params["schedule"][stage], num_visual - 1), num_visual)
        prefix, visual, text = sequence.tensor_split([start, start + num_visual])
        signals = {TextAttention(layer - 1, rows=raters): attention, Hidden(layer): visual}
        chosen = choose(method, signals, keep, layer=layer)
        assert_equal(chosen.kept, arrays[f"kept_slots_{stage}"])
        sequence = torch.cat([prefix, _entering(chosen, visual), text])
        assert_equal(torch.arange(len(sequence)), arrays[f"pos_{stage}"])

        official = arrays.get(f"hidden_{stage}")
        if certain and official is not None:
            _close(sequence, official)
        certain = official is not None
        sequence = sequence if official is None else official


def _sparsevlm_merge(golden: Golden, method: Method) -> None:
    rows, pairs = merged_clusters(golden.arrays["x"], golden.params["cluster_num"])
    _close(rows, golden.arrays["merged"])
    assert_equal(pairs[1].sort().values, torch.arange(len(golden.arrays["x"])))


def _affinity(golden: Golden, tokens: Tensor, rows: Tensor) -> Tensor:
    """Two vectors of ones turned to positions (N,) and (R,), multiplied: (N, R)."""
    width = golden.params["head_dim"]
    turns = golden.params["rope_base"] ** (-torch.arange(0, width, 2).double() / width)
    apart = (rows - tokens[:, None]).double()
    return (2 * (apart[..., None] * turns).cos().sum(-1) / width**0.5).float()


def _sparsevlm_plus(golden: Golden, method: Method) -> None:
    arrays, start = golden.arrays, golden.params["image_start"]
    behind = start + golden.params["n_image"]
    rows = behind + _raters(golden)
    text = torch.arange(behind, len(arrays["emb"]))
    assert method.positions == "original"
    alive = torch.arange(golden.params["n_image"])
    for stage, layer in enumerate(_cut_layers(golden, method)):
        signals = {
            TextAttention(layer - 1, rows=raters, each=True): arrays[
                f"attn_raters_{stage}"
            ].permute(2, 0, 1),
            RotaryAffinity(layer - 1, rows=raters): _affinity(golden, start + alive, rows),
        }
        keep = min(golden.params["schedule"][stage], len(alive) - 1)
        chosen = choose(method, signals, keep, layer=layer, alive=alive)
        alive = alive[chosen.kept]
        assert_equal(alive, arrays[f"kept_{stage}"])
        positions = torch.cat([torch.arange(start), start + alive, text])
        assert_equal(positions, arrays[f"pos_{stage}"])
    assert_equal(alive, arrays["kept"])


RUNNERS: dict[str, Runner] = {
    "sparsevlm": Runner("sparsevlm", lambda p: {"retain": p["retain"]}, _sparsevlm),
    "sparsevlm_merge": Runner("sparsevlm", lambda p: {}, _sparsevlm_merge),
    "sparsevlm_plus": Runner(
        "sparsevlm_plus",
        lambda p: {"retain": p["retain"], "heads": p["heads_kept"]},
        _sparsevlm_plus,
    ),
}
