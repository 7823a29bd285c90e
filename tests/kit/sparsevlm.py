"""Signals that SparseVLM and SparseVLM+ read, and what their golden runners share."""

import torch
from kit.golden import CLIP_L, Golden, assert_equal
from torch import Tensor
from vlmprune.prune.contract import Hidden, Method, RotaryAffinity, TextAttention
from vlmprune.prune.methods.decoder.sparsevlm import raters
from vlmprune.prune.registry import method_class


def compared_raters(golden: Golden) -> Tensor:
    """Numbers of the raters among the text behind the image, compared."""
    start, num_visual = golden.params["image_start"], golden.params["n_image"]
    _, visual, text = golden.arrays["emb"].tensor_split([start, start + num_visual])
    found = raters(visual, text).nonzero()[:, 0]
    assert_equal(found, golden.arrays["rater_idx"])
    return found


def cut_layers(golden: Golden, method: Method) -> list[int]:
    layers = [cut.layer for cut in method.cuts(CLIP_L)]
    assert layers == [layer + 1 for layer in golden.params["layers_0based"]]
    return layers


V1, V2 = "sparsevlm", "sparsevlm_plus"


def merged_of(removed: int) -> int:
    """Rows into which so many removed tokens are merged, as the official code counts."""
    return int((int(0.3 * removed) + 1) / 10) + 1


def some(name: str, num_tokens: int, *, layer=3, seed=0, constant=False, heads=4, width=6):
    """Random signals of the cut at `layer`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        Hidden: (num_tokens, width),
        RotaryAffinity: (num_tokens, 3),
        TextAttention: (num_tokens, heads, 3) if name == V2 else (num_tokens,),
    }
    signals = {}
    for signal in method_class(name)().reads(layer):
        drawn = torch.rand(shapes[type(signal)], generator=generator) + 0.1
        signals[signal] = torch.ones_like(drawn) if constant else drawn
    return signals
