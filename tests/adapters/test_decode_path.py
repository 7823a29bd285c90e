"""Decoding behind a pruned prompt is decoding on a smaller cache: the host waits for the device no
more than without a patch, and what is not padded gets no mask. The device is one of `devices`, of
whose values the host reads none unseen.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch as replaced

import pytest
import torch
import vlmprune
from kit import skips, zoo
from kit.devices import VALUES, Devices, Elsewhere, _Values, dispatch
from kit.oracle import decoder_of
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache
from vlmprune.adapters.cache_names import CACHE
from vlmprune.prune.contract import BeforeLLM, InEncoder
from vlmprune.prune.registry import method_class

DEVICE = torch.device("xla:0")
aten = torch.ops.aten
SIZED_BY_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.repeat_interleave.Tensor,
}
EXCEPTIONS = {
    ("elastic_cache", "padded"): "evicts while decoding, and counts what is left of each row"
}
"""Steps that wait once, and why."""
ROWS = {"single": (zoo.ONE,), "padded": (zoo.TWO, zoo.ONE)}
STEPS = 2  # behind the prefill, and behind a step


@contextmanager
def counted():
    """Within it, what makes the host wait is counted by its name, and `operations` are."""
    waits: Counter[str] = Counter()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            found = dispatch(function, args, kwargs or {})
            there = any(isinstance(x, Elsewhere) for x in args)
            waits["operations"] += there
            masks = function is aten.index.Tensor and any(
                index is not None and index.dtype == torch.bool for index in args[1]
            )
            comes_back = isinstance(found, torch.Tensor) and not isinstance(found, Elsewhere)
            if there and (function in SIZED_BY_VALUES or masks or comes_back):
                waits[str(function)] += 1
            return found

    read, to_list = _Values.__torch_function__, Elsewhere.tolist

    def seen(mode, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        waits[name] += name in VALUES and isinstance(args[0], Elsewhere)
        return read(mode, function, types, args, kwargs)

    def listed(tensor):
        waits["tolist"] += 1
        return to_list(tensor)

    with (
        replaced.object(_Values, "__torch_function__", seen),
        replaced.object(Elsewhere, "tolist", listed),
        _Values(),
        Operations(),
    ):
        yield waits


@torch.no_grad()
def decode(case: zoo.Case, model, inputs, ask=counted) -> list:
    """What `ask` sees of each decoding step."""
    cache = DynamicCache(config=model.config.get_text_config())
    out = model(**inputs, **{CACHE: cache})
    token, mask = out.logits[:, -1:].argmax(-1), inputs["attention_mask"]
    found = []
    for _ in range(STEPS):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        places = mask.sum(1, keepdim=True) - 1
        if case.fixed_positions:
            places = (places + model.model.rope_deltas).expand(3, -1, -1)
        step = functools.partial(model, input_ids=token, attention_mask=mask, position_ids=places)
        with ask() as seen:
            step(**{CACHE: cache})
        found.append(+seen)
    return found


def patched(model, name: str, options: dict):
    budget = zoo.budget(name, keep_ratio=0.4)
    return vlmprune.patch(model, name, **budget, **options | zoo.SMALL.get(name, {}))


def test_what_waits_is_counted():
    with Devices():
        there = torch.ones(2, device=DEVICE)
        with counted() as waits:
            there + there
            (
                there.tolist(),
                bool(there.sum() > 0),
                there.nonzero(),
                there.to("cpu"),
                there[there > 0],
            )
    assert set(+waits) > {"operations", "tolist", "__bool__", "aten._to_copy.default"}
    assert waits["aten.nonzero.default"] == waits["aten.index.Tensor"] == 1


WAYS = ["tome", "divprune", "pool", "fastv", "pyramiddrop", "todre", *zoo.ON_CACHE]
"""One method for each way in which caches are shortened, as a step knows the cache that it goes on
with, and not who chose."""


def cells() -> Iterator[tuple[zoo.Case, str, str]]:
    """On the first family every way alone and padded, and padded every other method that has hooks
    in the decoder's layers (those before it are gone when a step runs); padded every way on a
    family with positions of its own, and one by turns on others."""
    first, second, *others = *zoo.TWO_NAMES, *(set(zoo.FAMILY_NAMES) - set(zoo.TWO_NAMES))
    for name in vlmprune.methods():
        if name in WAYS or not issubclass(method_class(name), BeforeLLM | InEncoder):
            for rows in ROWS if name in WAYS else ["padded"]:
                yield zoo.CASES[first], name, rows
    yield from ((zoo.CASES[second], name, "padded") for name in WAYS)
    for family, name in zip(sorted(others), WAYS[1:], strict=False):
        yield zoo.CASES[family], name, "padded"


@functools.cache
def dense_steps(case: zoo.Case, rows: str) -> list[Counter[str]]:
    """What makes the host wait without a patch."""
    with Devices():
        model = on_device(case)
        return decode(case, model, inputs_on_device(case, rows))


@functools.cache
def on_device(case: zoo.Case):
    """The model there, on which all methods come and go."""
    model = case.model()
    # Fused attention makes masks of its own that know no other device.
    model.set_attn_implementation("eager")
    return model.to(DEVICE)


def inputs_on_device(case: zoo.Case, rows: str) -> dict:
    return {key: value.to(DEVICE) for key, value in case.inputs(ROWS[rows]).items()}


@pytest.mark.parametrize(
    ("case", "name", "rows"),
    [
        pytest.param(case, name, rows, id=f"{name}-{case.name}-{rows}")
        for case, name, rows in cells()
        if zoo.options_for(case, name) is not None
    ],
)
def test_decoding_waits_no_more_than_without_a_patch(case, name, rows):
    options, dense = zoo.options_for(case, name), dense_steps(case, rows)
    with Devices():
        model = on_device(case)
        if "clip" in options:
            options["clip"] = copy.deepcopy(options["clip"])  # that of other tests stays here
            options["clip"]._clip.set_attn_implementation("eager")
            options["clip"].to(DEVICE)
        with patched(model, name, options):
            ours = decode(case, model, inputs_on_device(case, rows))
    for step, unpatched in zip(ours, dense, strict=True):
        more = step - unpatched
        more.pop("operations", None)
        assert more.total() <= ((name, rows) in EXCEPTIONS), more


@zoo.turns("name", [n for n in zoo.REMOVING if n not in zoo.WEIGHING], zoo.FAMILIES.args[1])
@torch.no_grad()
def test_without_padding_there_is_no_mask(case, name):
    """Neither in the prefill, where attention is causal by itself, nor in a step."""
    options = zoo.options_for(case, name)
    if options is None:
        skips.skip("no signal", name)
    model, masks = case.model(), []
    for layer in decoder_of(model).layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs.get("attention_mask")),
            with_kwargs=True,
        )

    @contextmanager
    def nothing():
        yield Counter()

    with patched(model, name, options):
        decode(case, model, case.inputs((zoo.ONE,)), nothing)
    assert len(masks) == (1 + STEPS) * len(decoder_of(model).layers)
    assert all(mask is None for mask in masks)
