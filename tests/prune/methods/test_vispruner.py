"""VisPruner: by hand and round by round."""

import math

import pytest
import torch
from kit.golden import CLIP_L, Golden, Runner, assert_equal, choose
from kit.greedy import circle, given_signals, ids_of, make_tokens, tiling_of, unit_of
from vlmprune.prune.contract import Method
from vlmprune.prune.registry import method_class
from vlmprune.prune.tiling import Tiling


def _vispruner(golden: Golden, method: Method) -> None:
    features, cls_rows = golden.arrays["features"], golden.arrays["cls_rows"]
    masks = torch.zeros(features.shape[:2], dtype=torch.bool)
    for mask, row, here in zip(masks, cls_rows.mean(1), features, strict=True):
        signals = dict(zip(method.needs(CLIP_L), (row, here), strict=True))
        mask[choose(method, signals, golden.params["visual_token_num"]).kept] = True
    assert_equal(masks, golden.arrays["kept_mask"])
    ids = ids_of(tiling_of(golden))
    assert_equal(ids[masks.flatten()[ids]], golden.arrays["kept"])


GOLDEN = {
    "vispruner": Runner("vispruner", lambda p: {"important": p["important_ratio"]}, _vispruner),
}


def prune_round_by_round(scores, features, keep, important) -> list[int]:
    """The published steps on lists of tokens."""
    unit = unit_of(features)
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    first = int(keep * important)
    rest, wanted = ranked[first:], keep - first
    while wanted and len(rest) > wanted:
        drop = min(8, len(rest) - wanted)
        a, b = rest[::2], rest[1::2]
        alike = {i: max(float(unit[i] @ unit[j]) for j in b) for i in a}
        rest = sorted(a, key=lambda i: -alike[i])[drop:] + b
    return sorted(ranked[:first] + (rest if wanted else []))


@pytest.mark.parametrize("important", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("grid", [(6, 6), (5, 7), (3, 17), (1, 9)])
def test_vispruner_is_the_published_one(grid, important):
    """Odd numbers of tokens included, where the official code fails."""
    method = method_class("vispruner")(important=important)
    tokens = make_tokens(method, Tiling.single(*grid), seed=sum(grid))
    scores, features = tokens.signals.values()
    for keep in range(1, math.prod(grid)):
        expected = prune_round_by_round(scores.tolist(), features, keep, important)
        assert method.select(tokens, keep).kept.tolist() == expected


def test_vispruner_by_hand():
    """Seven tokens, four kept: two by attention, then one round on the five that are left."""
    method = method_class("vispruner")()
    scores = [0.1, 0.9, 0.5, 0.4, 0.8, 0.3, 0.2]
    # By attention 1, 4 | 2, 3, 5, 6, 0. Compared are 2, 5 and 0 with 3 and 6; the three that are
    # most alike to those go, as three are too many. 5 equals 3, 2 is near 6: only 0 would stay,
    # but of five tokens two are to stay, which are 3 and 6.
    features = circle(200, 0, 92, 10, 0, 10, 90)
    tokens = given_signals(method, Tiling.single(1, 7), scores, features)
    assert method.select(tokens, 4).kept.tolist() == [1, 3, 4, 6]
    # Six kept, three of them by attention (1, 4, 2) and three of 3, 5, 6, 0: 3 and 6 are compared
    # with 5 and 0, and 3 goes, which equals 5.
    assert method.select(tokens, 6).kept.tolist() == [0, 1, 2, 4, 5, 6]
