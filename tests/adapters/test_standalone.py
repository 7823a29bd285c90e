"""A method inside an image encoder that has no LLM behind it, of transformers and of timm."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import image_models
from kit.image_models import ATTENTIONS, DEPTH, walk

EACH = pytest.mark.parametrize("tiny", image_models.EVERY)
PATCHES = 36


def by_hand(tiny, model, pixels, name, after):
    """What the model must return, and the walk of each picture."""
    parts = tiny.parts(model)
    with torch.no_grad():
        walks = [
            walk(parts, one, name, after, cls=tiny.cls, fuse=not tiny.rotary) for one in pixels
        ]
        return torch.stack([parts.finish(w.rows, w.sizes) for w in walks]), walks


def told(last, walks, prefix):
    """Whether the report says what happened to each picture."""
    for number, own in enumerate(walks):
        rows = own.place[prefix:]
        kept, order = last.kept[number], last.order[number]
        assert kept.tolist() == sorted(rows[rows >= 0].tolist())
        assert last.tokens_kept[number] == len(rows)
        order = kept if order is None else order
        members = last.groups[number]
        if members is not None:
            pairs = zip(order.tolist(), members, strict=True)
            expected = zip(rows.clamp_min(-1).tolist(), own.merged, strict=True)
            assert sorted((place, sorted(merged)) for place, merged in expected) == sorted(
                (place, merged.tolist()) for place, merged in pairs
            )


@EACH
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_merging_equals_a_loop(tiny, attention):
    model, pixels = tiny.model(attention), image_models.pixels()
    after = {block: PATCHES - 6 * (block + 1) for block in range(DEPTH)}
    expected, walks = by_hand(tiny, model, pixels, "tome", after)
    with vlmprune.patch(model, "tome", r=6) as handle, torch.no_grad():
        found = tiny.run(model, pixels)
    assert handle.last.encoder == [
        ([PATCHES - 6 * block] * 2, [PATCHES - 6 * (block + 1)] * 2) for block in range(DEPTH)
    ]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    told(handle.last, walks, tiny.parts(model).prefix)


@EACH
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_choosing_equals_a_loop(tiny, attention):
    model, pixels = tiny.model(attention), image_models.pixels()
    expected, walks = by_hand(tiny, model, pixels, "evit", {1: 18, 2: 9})
    with vlmprune.patch(model, "evit", layers=(1, 2), keep_ratio=0.25), torch.no_grad():
        found = tiny.run(model, pixels)
        last = model._vlmprune_handle.last
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    told(last, walks, tiny.parts(model).prefix)
    assert last.stages[0].kept[0].tolist() == last.kept[0].tolist()
    assert last.select_seconds > 0
