"""CDPruner: relevance to the text, weights over the image, picks in each tile."""

from dataclasses import replace

import pytest
import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from kit.greedy import TILINGS, best_determinants, circle, ids_of, make_tokens, tiling_of
from vlmprune.prune.contract import ClipImage, ClipText, Features, Method, TextEmbeddings
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.methods.before_llm.cdpruner import likeness, relevance
from vlmprune.prune.ops.dpp import weighted_cosines, weighted_greedy_map
from vlmprune.prune.ops.spread import share
from vlmprune.prune.registry import method_class


def _cdpruner(golden: Golden, method: Method) -> None:
    features, image = golden.arrays["features"], golden.arrays["image_embeds"]
    text, count = golden.arrays["text_embeds"], golden.params["visual_token_num"]
    tiling = tiling_of(golden)
    ids = ids_of(tiling)
    signals = {
        Features(): features.flatten(0, 1)[ids],
        ClipImage(): image.flatten(0, 1)[ids],
        ClipText(): text,
    }
    kept = ids[choose(method, signals, count * len(features), tiling=tiling).kept]
    assert_equal(kept, golden.arrays["kept"])
    masks = torch.zeros(features.shape[:2], dtype=torch.bool)
    masks.view(-1)[kept] = True
    assert_equal(masks, golden.arrays["kept_mask"])

    weights = relevance(image.flatten(0, 1), text).view(masks.shape)
    order = weighted_greedy_map(list(features), weights, count)
    assert_equal(order, golden.arrays["select_order"])


GOLDEN = {
    "cdpruner": Runner("cdpruner", lambda p: {}, _cdpruner),
}


def test_likeness_to_the_prompt_needs_no_clip():
    """The mean over the text's tokens, with its own sign; without text all are alike."""
    features = circle(0, 90, 180, 60)
    scaled = torch.tensor([1, 0.5, 0, 0.75])
    torch.testing.assert_close(likeness(features, circle(0, 0)), scaled, atol=1e-5, rtol=0)
    two = likeness(features, torch.tensor([[1.0, 0], [0, 3]]))
    assert two.argmax() == 3 and two.argmin() == 2
    assert likeness(features, features[:0]).tolist() == [1] * 4
    method = method_class("cdpruner")(relevance="prompt")
    signals = {Features(): features, TextEmbeddings(): circle(0, 0)}
    assert method.needs(CLIP_L) == tuple(signals)
    assert choose(method, signals, 1).kept.tolist() == [0]
    # 60 degrees: weight 0.75, and its own part beside the first pick is sin(60)^2.
    assert choose(method, signals, 2).kept.tolist() == [0, 3]
    with pytest.raises(MethodFieldError, match=r"relevance='text' .*'clip' or 'prompt'"):
        method_class("cdpruner")(relevance="text")


def test_relevance_is_unlikeness_to_the_text():
    image, text = circle(0, 90, 180, 60), circle(0, 0)
    scaled = [1e-6 / 2, 0.5, 1, 0.25]
    torch.testing.assert_close(relevance(image, text), torch.tensor(scaled), atol=1e-6, rtol=1e-6)
    two = relevance(image, torch.tensor([[1.0, 0], [0, 3]]))  # the mean over segments counts
    assert two.argmax() == 2 and two.argmin() == 3
    assert relevance(image[:1].repeat(4, 1), text).tolist() == [1] * 4
    assert relevance(image, text[:0]).tolist() == [1] * 4


@pytest.mark.parametrize("tiling", ["2 x 2", "without padding", "with a lost tile", "video"])
@pytest.mark.parametrize("keep", [2, 5, 17, 19])
def test_cdpruner_weighs_over_the_image_and_picks_in_each_tile(tiling, keep):
    method, tiling = method_class("cdpruner")(), TILINGS[tiling].without_newlines()
    tokens = make_tokens(method, tiling, seed=keep)
    features, image, text = tokens.signals.values()
    image = image * torch.linspace(0.1, 3, len(image))[:, None] + 1  # unequal tiles
    tokens = replace(tokens, signals={**tokens.signals, ClipImage(): image})
    weights = relevance(image, text)
    tiles = tiling.tile_patches(torch.device("cpu"))
    expected = []
    for tile, count in zip(tiles, share(keep, [len(tile) for tile in tiles]), strict=True):
        (kernel,) = weighted_cosines([features[tile]], weights[None, tile])
        expected += tile[best_determinants(kernel, min(count, 8))].tolist()
        assert count <= 8, "no more than the rank"
    assert method.select(tokens, keep).kept.tolist() == sorted(expected)
