"""TokenSelect: votes by hand, batches against a slow reading."""

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import skips
from kit.entries import seeded
from kit.golden import CLIP_L, Golden, Runner, assert_equal
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.methods.cache.token_select import TokenSelect, _products
from vlmprune.prune.registry import method


@dataclass(frozen=True, kw_only=True)
class OfficialTokenSelect(TokenSelect):
    """Query head h is compared with head h % key heads."""

    def _grouped(self, query: Tensor, key_heads: int) -> Tensor:
        return query.unflatten(1, (-1, key_heads)).transpose(1, 2)


def _token_select(golden: Golden, method: Any) -> None:
    query, keys = golden.arrays["q"].mean(0), golden.arrays["k"].transpose(0, 1)
    valid = torch.ones(1, keys.shape[1], dtype=torch.bool)
    columns, counts = method.attended(query[None], keys[None], valid, None)
    assert_equal(columns[counts], golden.arrays["kept"])


GOLDEN = {
    "tokenselect": Runner(
        "token_select",
        lambda p: {key: p[key] for key in ("n_init", "n_local", "top_k")},
        _token_select,
        OfficialTokenSelect,
    ),
}
SMALL = {"n_init": 2, "n_local": 3, "top_k": 2}


def all_valid(*lengths: int) -> torch.Tensor:
    """Rows of these lengths, padded on the left."""
    stored = max(lengths)
    return torch.arange(stored) >= stored - torch.tensor(lengths)[:, None]


def rows_of(result) -> list[list[int]]:
    columns, counts = result
    assert columns.dtype == torch.int64 and counts.dtype == torch.bool
    assert columns.shape == counts.shape
    assert (columns.diff(dim=1) >= 0).all()
    assert counts[:, -1].all(), "the newest entry counts"
    return [row[count].tolist() for row, count in zip(columns, counts, strict=True)]


def slow_select(call, query, keys, length: int, keep: int | None) -> list[int]:
    """One row, entry by entry. `length`: its last entries, which are no padding."""
    stored = keys.shape[1]
    entries = list(range(stored - length, stored))
    top_k = call.top_k if keep is None else max(1, keep - call.n_init - call.n_local)
    if length <= call.n_init + call.n_local + top_k:
        return entries
    between = entries[call.n_init : length - call.n_local]
    votes = torch.zeros(len(between))
    group = len(query) // len(keys)
    for h, q in enumerate(query):
        of = h % len(keys) if type(call) is OfficialTokenSelect else h // group
        votes += (keys[of, between] @ q).softmax(0)
    side = call.pool // 2
    pooled = [max(votes[max(0, i - side) : i + side + 1]) for i in range(len(between))]
    best = sorted(range(len(between)), key=lambda i: (-pooled[i], i))[:top_k]
    picked = [between[i] for i in sorted(best)]
    return entries[: call.n_init] + picked + entries[-call.n_local :]


def test_token_select_by_hand():
    """One head: keys 4 and 6 are most like the query; 0 and 9, which are more so, stay anyway."""
    keys = torch.tensor([9.0, 0, 1, 2, 5, 1, 4, 3, 0, 8])[None, None, :, None]
    call = TokenSelect(n_init=1, n_local=2, top_k=2)
    result = call.attended(torch.ones(1, 1, 1), keys, all_valid(10), None)
    assert rows_of(result) == [[0, 4, 6, 8, 9]]
    assert result[1].all()


def test_heads_vote_softly():
    """Softmax per head first: one head's huge product is one vote, two heads' small ones are two.

    Entry 1 has the larger sum of products, entry 2 the most votes.
    """
    query = torch.tensor([[20.0, 0], [0, 5], [0, 5]])[None]
    keys = torch.tensor([[0.0, 0], [1, 0], [0, 1], [0, 0], [0, 0]]).expand(1, 3, -1, -1)
    call = TokenSelect(n_init=0, n_local=1, top_k=1)
    assert rows_of(call.attended(query, keys, all_valid(5), None)) == [[2, 4]]


def test_votes_have_no_scale():
    """Each head prefers its own entry by little: with the usual scale, a third one would win."""
    width = 100
    keys = torch.zeros(1, 2, 4, width)
    keys[0, 0, :3, 0] = torch.tensor([21.0, 0, 18])
    keys[0, 1, :3, 0] = torch.tensor([0.0, 20, 18])
    query = torch.zeros(1, 2, width)
    query[..., 0] = 1
    call = TokenSelect(n_init=0, n_local=1, top_k=1)
    products = keys[0, :, :3, 0]
    assert (products / math.sqrt(width)).softmax(-1).sum(0).argmax() == 2
    assert rows_of(call.attended(query, keys, all_valid(4), None)) == [[0, 3]]


def test_query_heads_ask_their_own_keys():
    """Four query heads, two heads of keys: 0 and 1 ask the first one; officially 0 and 2 do.

    Head 1 asks loudest, for entry 0 of the first and for entry 1 of the second.
    """
    keys = torch.zeros(1, 2, 4, 1)
    keys[0, :, :2, 0] = torch.tensor([[8.0, 0], [0, 8.0]])
    query = torch.tensor([0, 1.0, 0, 0.1])[None, :, None]
    for cls, best in ((TokenSelect, 0), (OfficialTokenSelect, 1)):
        call = cls(n_init=0, n_local=1, top_k=1)
        assert rows_of(call.attended(query, keys, all_valid(4), None)) == [[best, 3]]


def test_pooled_votes_reach_neighbours():
    """Entry 5 has the most votes, so with pooling its neighbours are next, the first one first."""
    keys = torch.tensor([0.0, 0, 3, 0, 0, 5, 0, 0, 0, 0])[None, None, :, None]
    args = (torch.ones(1, 1, 1), keys, all_valid(10), None)
    fields = {"n_init": 1, "n_local": 1, "top_k": 2}
    assert rows_of(TokenSelect(**fields).attended(*args)) == [[0, 2, 5, 9]]
    assert rows_of(TokenSelect(**fields, pool=3).attended(*args)) == [[0, 4, 5, 9]]


def test_pooling_ignores_what_is_not_between():
    keys = torch.tensor([0.0, 9, 0, 0, 1, 0, 9, 9])[None, None, :, None]
    call = TokenSelect(n_init=2, n_local=2, top_k=1, pool=3)
    result = call.attended(torch.ones(1, 1, 1), keys, all_valid(8), None)
    assert rows_of(result) == [[0, 1, 3, 6, 7]]


def test_ties_go_to_the_lower_entry():
    keys = torch.ones(2, 2, 12, 4)
    result = TokenSelect(**SMALL).attended(torch.ones(2, 4, 4), keys, all_valid(12, 10), None)
    assert rows_of(result) == [[0, 1, 2, 3, 9, 10, 11], [2, 3, 4, 5, 9, 10, 11]]


def test_all_entries_where_none_can_be_left_out():
    query = torch.ones(1, 2, 4)
    for stored, budget, all_of_them in (
        (7, None, True),
        (8, None, False),
        (8, [8], True),
        (8, [7], False),
        (8, [99], True),
        (6, [1], True),  # the first, the last and one more
        (7, [1], False),
        (3, [1], True),
    ):
        keep = None if budget is None else torch.tensor(budget)
        result = TokenSelect(**SMALL).attended(
            query, torch.ones(1, 1, stored, 4), all_valid(stored), keep
        )
        assert (result is None) is all_of_them, (stored, budget)
    published = TokenSelect()
    assert published.attended(query, torch.ones(1, 1, 2688, 4), all_valid(2688), None) is None
    columns, counts = published.attended(query, torch.ones(1, 1, 2689, 4), all_valid(2689), None)
    assert columns.shape == (1, 2688) and counts.all()


def test_short_rows_of_a_batch_attend_to_everything():
    """Their fillers do not count; so does padding."""
    lengths = (20, 7, 5, 4, 1, 8)
    keys, query = seeded(6, 2, 20, 4), seeded(6, 4, 4, seed=1)
    columns, counts = TokenSelect(**SMALL).attended(query, keys, all_valid(*lengths), None)
    assert columns.shape == (6, 7)
    assert counts.sum(1).tolist() == [7, 7, 5, 4, 1, 7]
    assert ((columns >= 0) & (columns < 20)).all()
    rows = rows_of((columns, counts))
    for row, length in zip(rows[1:5], lengths[1:5], strict=True):
        assert row == list(range(20 - length, 20))


@given(st.data())
def test_batches_equal_rows_and_the_slow_reading(data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    budgets = data.draw(
        st.none() | st.lists(st.integers(1, 34), min_size=len(lengths), max_size=len(lengths))
    )
    heads, group = data.draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2)]))
    call = data.draw(st.sampled_from([TokenSelect, OfficialTokenSelect]))(
        n_init=data.draw(st.integers(0, 4)),
        n_local=data.draw(st.integers(1, 5)),
        top_k=data.draw(st.integers(1, 9)),
        pool=data.draw(st.sampled_from([1, 3])),
    )
    stored, seed = max(lengths), data.draw(st.integers(0, 9))
    keys = seeded(len(lengths), heads, stored, 4, seed=seed)
    query = seeded(len(lengths), heads * group, 4, seed=seed + 1)
    keep = None if budgets is None else torch.tensor(budgets)
    result = call.attended(query, keys, all_valid(*lengths), keep)
    wanted = [
        slow_select(call, query[i], keys[i], n, None if budgets is None else budgets[i])
        for i, n in enumerate(lengths)
    ]
    if result is None:
        assert all(len(row) == n for row, n in zip(wanted, lengths, strict=True))
        return
    assert result[0].shape[1] <= stored
    assert rows_of(result) == wanted
    for i, n in enumerate(lengths):
        alone = call.attended(
            query[i : i + 1],
            keys[i : i + 1, :, stored - n :],
            all_valid(n),
            None if keep is None else keep[i : i + 1],
        )
        row = list(range(n)) if alone is None else rows_of(alone)[0]
        assert [column + stored - n for column in row] == wanted[i]


def test_budgets_of_a_batch_differ():
    """No row is wider than what is stored, and one that keeps all does not speak for the others."""
    keys, query = torch.ones(2, 1, 10, 4), torch.ones(2, 1, 4)
    result = TokenSelect(**SMALL).attended(query, keys, all_valid(10, 10), torch.tensor([7, 99]))
    assert result[0].shape == (2, 10)
    assert rows_of(result) == [[0, 1, 2, 3, 7, 8, 9], list(range(10))]


def test_padding_is_never_read():
    """Whatever stands in it."""
    keys, query = seeded(2, 2, 16, 4), seeded(2, 4, 4, seed=1)
    valid = all_valid(16, 11)
    call = TokenSelect(**SMALL)
    wanted = rows_of(call.attended(query, keys, valid, None))
    for junk in (1e4, math.nan, math.inf):
        spoiled = keys.masked_fill(~valid[:, None, :, None], junk)
        assert rows_of(call.attended(query, spoiled, valid, None)) == wanted


def test_token_select_changes_nothing_and_waits_for_nothing():
    keys, query, valid = seeded(2, 2, 16, 4), seeded(2, 4, 4, seed=1), all_valid(16, 11)
    call = TokenSelect(**SMALL, pool=3)
    keep = torch.tensor([9, 7])
    call.attended(query, keys, valid, keep)
    assert {t._version for t in (keys, query, valid, keep)} == {0}
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(t) for t in (query, keys, valid)]
        assert call.attended(*fakes, None)[0].shape == (2, 7)


def test_half_precision_is_multiplied_in_float32():
    """On a GPU without a copy of the keys in float32, on the CPU with one."""
    query, keys = seeded(2, 2, 3, 8).bfloat16(), seeded(2, 2, 5, 8).bfloat16()
    assert torch.equal(_products(query, keys), query.float() @ keys.float().mT)
    with FakeTensorMode():
        query, keys = (torch.empty(2, 2, n, 8, dtype=torch.bfloat16, device="cuda") for n in (3, 5))
        products = _products(query, keys)
    assert products.shape == (2, 2, 3, 5) and products.dtype == torch.float32


@pytest.mark.cuda
@skips.needs("gpu")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_on_a_gpu(dtype):
    query, keys = seeded(2, 4, 3, 64).to(dtype), seeded(2, 4, 999, 64).to(dtype)
    ours = _products(query.cuda(), keys.cuda()).cpu()
    torch.testing.assert_close(ours, query.float() @ keys.float().mT, rtol=1e-4, atol=1e-4)


def test_token_select_needs_nothing():
    assert method("token_select").budget is None
    assert TokenSelect().needs(CLIP_L) == ()
    assert (TokenSelect().n_init, TokenSelect().n_local, TokenSelect().top_k) == (128, 512, 2048)
