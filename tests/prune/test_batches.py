"""Several images asked together: the same choices as alone, and one pass where a method has it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.drawn import NAMES, make_tokens, same
from torch.utils._python_dispatch import TorchDispatchMode
from vlmprune.prune.batches import Greedy
from vlmprune.prune.contract import BeforeLLM, Choosing
from vlmprune.prune.registry import method_class
from vlmprune.prune.select import select, select_all
from vlmprune.prune.tiling import Tiling

BEFORE = [name for name in NAMES if issubclass(method_class(name), BeforeLLM)]
ONE_PASS = [n for n in BEFORE if method_class(n).select_batch is not Choosing.select_batch]
"""Methods that say that they choose for all images at once."""


class Operations(TorchDispatchMode):
    """Counts what computes; views and the handing out of results are free."""

    FREE = ("view", "slice", "select", "unbind", "detach", "alias", "t.", "transpose", "expand")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        self.count += not name.startswith(self.FREE)
        return func(*args, **(kwargs or {}))


def operations(method, images, keep: int) -> int:
    select_all(method, images, [keep] * len(images))  # what is cached by size is there
    with Operations() as seen:
        select_all(method, images, [keep] * len(images))
    return seen.count


@pytest.mark.parametrize("name", BEFORE)
@given(
    grids=st.lists(
        st.sampled_from([(4, 6), (6, 4), (3, 8), (5, 7), (6, 6)]), min_size=2, max_size=5
    ),
    shares=st.lists(st.sampled_from([0.25, 0.5]), min_size=5, max_size=5),
    seed=st.integers(0, 2**16),
)
def test_images_of_equal_number_and_different_shape(name, grids, shares, seed):
    """4 x 6, 6 x 4 and 3 x 8 are one pass, though their neighbours lie elsewhere."""
    method = method_class(name)()
    images = [make_tokens(method, grid, seed=seed + i) for i, grid in enumerate(grids)]
    keeps = [round(t.num_tokens * s) for t, s in zip(images, shares, strict=False)]
    together = select_all(method, images, keeps)
    for found, tokens, keep in zip(together, images, keeps, strict=True):
        assert same(found, select(method, tokens, keep))


def test_the_methods_with_one_pass():
    """A method that loses its pass would leave the next test silently."""
    assert set(ONE_PASS) >= {
        "cdpruner",
        "cls_topk",
        "divprune",
        "fopru",
        "hiprune",
        "todre",
        "visionzip",
        "vtc_cls",
    }


@pytest.mark.parametrize("name", ONE_PASS)
def test_eight_images_are_hardly_more_operations_than_one(name):
    """What remains for every image is how its signals are put beside the others'."""
    method = method_class(name)()
    images = [make_tokens(method, Tiling.single(8, 8), seed=seed) for seed in range(8)]
    one, eight = operations(method, images[:1], 16), operations(method, images, 16)
    assert 0 < eight <= 4 * one


@pytest.mark.parametrize("name", [n for n in BEFORE if issubclass(method_class(n), Greedy)])
def test_what_is_picked_one_by_one_is_one_pass_whatever_the_counts(name):
    """The tiles of an image often have two counts, one apart."""
    method = method_class(name)()
    images = [make_tokens(method, Tiling.single(8, 8), seed=seed) for seed in range(2)]
    with Operations() as seen:
        found = select_all(method, images, [15, 16])
    assert seen.count <= 1.1 * operations(method, images, 16)
    assert [chosen.count for chosen in found] == [15, 16]


def test_there_are_methods_that_pick_one_by_one():
    assert {"divprune", "cdpruner", "todre"} <= {
        name for name in BEFORE if issubclass(method_class(name), Greedy)
    }


def test_operations_are_counted_where_images_are_asked_in_turn():
    method = method_class("vispruner")()
    images = [make_tokens(method, (8, 8), seed=seed) for seed in range(8)]
    assert operations(method, images, 16) == 8 * operations(method, images[:1], 16)
    assert torch.equal(select(method, images[0], 64).kept, torch.arange(64))


@pytest.mark.parametrize(
    ("name", "fields", "tower"),
    [
        ("fopru", {"strategy": "row", "axis": "auto"}, "clip"),
        ("hiprune", {}, "merging"),
    ],
)
def test_the_other_rule_of_a_method_in_one_pass(name, fields, tower):
    method = method_class(name)(**fields)
    grids = [(4, 6), (6, 4), (4, 6), (5, 7)]
    images = [make_tokens(method, grid, seed=i, tower=tower) for i, grid in enumerate(grids)]
    together = method.select_batch([(tokens, 9) for tokens in images])
    alone = [method.select(tokens, 9) for tokens in images]
    assert all(map(same, together, alone))
