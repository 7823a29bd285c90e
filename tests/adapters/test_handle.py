"""The handle describes the last prefill that saw images: counts that the budget promised, the kept
tokens, their picture."""

from __future__ import annotations

import pytest
import torch
import vlmprune
from kit import zoo
from PIL import Image


@zoo.WHOLE
def test_budgets_that_count_cost_give_what_they_promise(case):
    n = case.num_tokens("C")
    for name, layer in (("divprune", 0), ("fastv", 2)):
        model = case.model()
        handle = vlmprune.patch(model, name, average_tokens=0.75 * n)
        model(**case.inputs(zoo.SINGLE))
        layers = handle.last.tokens_per_layer[0]
        assert list(layers) == [n] * layer + [len(handle.last.kept[0])] * (4 - layer)
        assert abs(sum(layers) / 4 - 0.75 * n) <= 0.5
    handle = vlmprune.patch(model, "divprune", flops_ratio=0.5)
    model(**case.inputs(zoo.SINGLE))
    width, inner = zoo.DECODER["hidden_size"], zoo.DECODER["intermediate_size"]

    def flops(tokens: int) -> int:
        return tokens * (4 * width**2 + 3 * width * inner) + 2 * tokens**2 * width

    best = min(range(1, n), key=lambda k: abs(flops(k) / flops(n) - 0.5))
    assert len(handle.last.kept[0]) == best


@zoo.ALL
def test_the_handle_describes_the_last_prefill_that_saw_images(case):
    model = case.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    inputs = case.inputs(zoo.BATCH)
    model(**inputs)
    prefill = [k.clone() for k in handle.last.kept]
    model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)
    assert len(handle.last.kept) == len(prefill), "beams are not expanded"
    assert all(map(torch.equal, handle.last.kept, prefill))
    assert len(handle.last.tokens_per_layer) == len(zoo.BATCH)
    assert handle.last.pruned is True
    assert handle.last.select_seconds >= 0
    model(**case.inputs((zoo.NONE,)))
    assert all(map(torch.equal, handle.last.kept, prefill)), "a text-only call overwrote it"


@zoo.BOTH_FAMILIES
def test_the_overlay_shows_what_was_kept(case):
    model = case.model()
    handle = vlmprune.patch(model, "divprune", keep_ratio=0.4)
    with pytest.raises(Exception, match="run"):
        handle.overlay(Image.new("RGB", (60, 60)))
    model(**case.inputs(zoo.BATCH))
    for index, name in enumerate(zoo.images(zoo.BATCH)):
        rows, columns = case.grid(name)
        colour = (250, 200, 150)
        picture = Image.new("RGB", (columns * 20, rows * 20), colour)
        shown = handle.overlay(picture, index=index)
        assert picture.getcolors() == [(columns * rows * 400, colour)], "the caller's was changed"
        height, width = shown.height / rows, shown.width / columns
        kept = set(handle.last.kept[index].tolist())
        for token in range(rows * columns):
            row, column = divmod(token, columns)
            middle = shown.getpixel((int((column + 0.5) * width), int((row + 0.5) * height)))
            assert (middle == colour) == (token in kept), (index, token)
    with pytest.raises(IndexError, match="3"):
        handle.overlay(picture, index=3)
