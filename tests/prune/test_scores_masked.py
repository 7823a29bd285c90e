"""Scores of an encoder's attention where rows do not see all keys: masks are part of every softmax,
and rows that fill a batch up ask nothing."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask
from vlmprune.adapters.places.encoder import _seen
from vlmprune.prune import scores

READERS = {
    "cls_row": scores.cls_row,
    "received": scores.received,
    "to_cls": scores.to_cls,
    "head_rank": functools.partial(scores.head_rank, rounds=3, cls_start=2.0),
}
ROWS, PARTS = 150, (70, 80)  # more rows than a chunk holds
EACH = pytest.mark.parametrize("name", READERS)


def heads(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=draw) * 2, torch.randn(*shape, generator=draw) * 2


def packed() -> torch.Tensor:
    """(1, 1, S, S) bool: two pictures in one sequence."""
    owner = torch.arange(2).repeat_interleave(torch.tensor(PARTS))
    return (owner[:, None] == owner)[None, None]


def added(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("name", ["cls_row", "received", "to_cls"])
@pytest.mark.parametrize("form", [lambda seen: seen, added], ids=["bool", "added"])
def test_pictures_of_one_sequence_are_scored_as_if_alone(name, form):
    query, key = heads(1, 3, ROWS, 8)
    found = READERS[name](query, key, 0.4, form(packed()))
    alone = [
        READERS[name](q, k, 0.4)
        for q, k in zip(query.split(PARTS, 2), key.split(PARTS, 2), strict=True)
    ]
    if name != "received":  # of the first row, which is in the first picture
        alone[1] = torch.zeros_like(alone[1])
    torch.testing.assert_close(found, torch.cat(alone, 1), atol=1e-6, rtol=1e-5)
    assert (found - READERS[name](query, key, 0.4)).abs().max() > 0.05


@EACH
@pytest.mark.parametrize("rows", [1, ROWS])
def test_padding_neither_asks_nor_is_asked(name, rows):
    query, key = heads(2, 3, ROWS, 8)
    real = torch.ones(2, 1, rows, ROWS, dtype=torch.bool)
    real[1, ..., 100:] = False
    for mask in (real, added(real)):
        found = READERS[name](query, key, 0.4, mask)
        for picture, size in ((0, ROWS), (1, 100)):
            own = slice(picture, picture + 1)
            alone = READERS[name](query[own, :, :size], key[own, :, :size], 0.4)
            torch.testing.assert_close(found[own, :size], alone, atol=2e-6, rtol=1e-5)


def test_the_masks_of_every_implementation_of_attention_are_read():
    query, key = heads(1, 3, ROWS, 8)
    assert _seen(None, query, key) is None
    blocks = create_block_mask(
        lambda b, h, q, k: (q < PARTS[0]) == (k < PARTS[0]), 1, None, ROWS, ROWS, device="cpu"
    )
    assert torch.equal(_seen(blocks, query, key), packed())
    padding = torch.ones(1, ROWS, dtype=torch.long)
    padding[:, 100:] = 0
    assert torch.equal(_seen(padding, query, key)[0, 0, 0], padding[0].bool())
