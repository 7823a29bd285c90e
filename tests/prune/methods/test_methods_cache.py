"""Methods on the KV cache: by hand, against slow readings of their rules, and exact."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit import skips
from kit.compressing import COMPRESSING
from kit.golden import CLIP_L, load
from kit.golden_cache import OfficialElasticCache, OfficialTokenSelect, entries_of
from kit.paths import TESTS
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.contract import CacheEntries, ReceivedInLayer
from vlmprune.prune.errors import BudgetError, MethodFieldError
from vlmprune.prune.methods.cache.token_select import _products
from vlmprune.prune.presses import observed
from vlmprune.prune.registry import method, method_class

ElasticCache = method_class("elastic_cache")
TokenSelect = method_class("token_select")
VisualPress = method_class("visual_press")
GOLDEN = sorted((TESTS / "golden").glob("elasticcache__*.npz"))


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(visual: str, *, heads: int = 2, group: int = 2, width: int = 4, seed: int = 0):
    """Entries of a prompt: "v" for a visual one, anything else for text."""
    length = len(visual)
    keys, values, queries = (
        seeded(h, length, width, seed=seed + i) for i, h in enumerate((heads, heads, heads * group))
    )
    return entries_of(
        keys,
        values,
        queries=queries,
        visual=torch.tensor([letter == "v" for letter in visual]),
        received=seeded(length, seed=seed + 3).abs(),
    )


def tensors(entries: CacheEntries) -> list[torch.Tensor]:
    return [
        entries.keys,
        entries.values,
        entries.queries,
        entries.visual,
        entries.hidden,
        *entries.rotary,
        *entries.signals.values(),
    ]


def scored(*received: float) -> CacheEntries:
    """One head with keys 1, 10, 100... so that sums tell their members; values are negative."""
    keys = 10.0 ** torch.arange(len(received))[None, :, None]
    return entries_of(keys, -keys, received=torch.tensor(received))


IDS = [f"{name}-{'-'.join(map(str, fields.values()))}" for name, fields in COMPRESSING]


# --- All that remove entries --------------------------------------------------------------------


@pytest.mark.parametrize(("name", "fields"), COMPRESSING, ids=IDS)
@given(st.text("vt", min_size=2, max_size=24), st.integers(0, 5), st.data())
def test_every_count_is_exact(name, fields, visual, seed, data):
    entries = made(visual, seed=seed)
    least = visual.count("t") + 1 if name == "visual_press" else 1
    if least >= len(visual):
        return
    keep = data.draw(st.integers(least, len(visual) - 1))
    done = method_class(name)(**fields).compress(entries, keep)
    rows = done.kept if done.kept.ndim == 2 else done.kept[None]
    assert done.kept.dtype == torch.int64
    for row in rows.tolist():
        assert row == sorted(set(row)) and len(row) == keep
        assert row[0] >= 0 and row[-1] < len(visual)
    for tensor in (done.keys, done.values):
        assert tensor is None or tensor.shape == (2, keep, 4)
    if name == "visual_press":
        text = {i for i, letter in enumerate(visual) if letter == "t"}
        assert done.kept.shape == (2, keep)
        assert all(text <= set(row) for row in rows.tolist())


@pytest.mark.parametrize(("name", "fields"), COMPRESSING, ids=IDS)
def test_inputs_stay_and_results_repeat(name, fields):
    entries = made("tvvvvvvvvvtt")
    before = [tensor.clone() for tensor in tensors(entries)]
    first, second = (method_class(name)(**fields).compress(entries, 7) for _ in range(2))
    for tensor, was in zip(tensors(entries), before, strict=True):
        assert tensor._version == 0
        assert torch.equal(tensor, was)
    assert torch.equal(first.kept, second.kept)
    assert first.keys is None or torch.equal(first.keys, second.keys)


@pytest.mark.parametrize(("name", "fields"), COMPRESSING, ids=IDS)
def test_ties_go_to_the_lower_index(name, fields):
    keys = torch.ones(2, 9, 4)
    visual = torch.tensor([False] + [True] * 7 + [False])
    entries = entries_of(keys, keys, received=torch.ones(9), visual=visual)
    fields = {**fields, "kernel": 1} if name == "visual_press" else fields
    for keep in range(3, 9):
        kept = method_class(name)(**fields).compress(entries, keep).kept
        assert kept.view(-1, keep)[-1].tolist() == [*range(keep - 1), 8]


@pytest.mark.parametrize(("name", "fields"), COMPRESSING, ids=IDS)
def test_scores_are_float32(name, fields):
    """bfloat16 entries keep what the same numbers in float32 keep, and stay bfloat16."""
    exact = made("tvvvvvvvvvvvvvvvvvtt", width=8)
    low = entries_of(
        exact.keys.bfloat16(),
        exact.values.bfloat16(),
        queries=exact.queries.bfloat16(),
        visual=exact.visual,
        received=exact.signals[ReceivedInLayer(0)],
    )
    high = entries_of(
        low.keys.float(),
        low.values.float(),
        queries=low.queries.float(),
        visual=exact.visual,
        received=exact.signals[ReceivedInLayer(0)],
    )
    ours, wanted = (method_class(name)(**fields).compress(e, 11) for e in (low, high))
    assert torch.equal(ours.kept, wanted.kept)
    if ours.keys is not None:
        assert ours.keys.dtype == torch.bfloat16
        assert torch.equal(ours.keys, wanted.keys.bfloat16())


@pytest.mark.parametrize("name", ["elastic_cache", "visual_press"])
def test_reads_the_layer_that_it_is_given(name):
    fields = {"press": "received"} if name == "visual_press" else {}
    call = method_class(name)(**fields)
    assert call.needs(CLIP_L) == tuple(ReceivedInLayer(layer) for layer in range(32))
    keys = torch.ones(1, 6, 2)
    rising = torch.arange(6.0)
    signals = {ReceivedInLayer(3): rising, ReceivedInLayer(17): -rising}
    for layer, best in ((3, 4), (17, 1)):
        entries = replace(entries_of(keys, keys, layer=layer), signals=signals)
        assert best in call.compress(entries, 3).kept.flatten().tolist()


# --- Elastic cache: compression ----------------------------------------------------------------


def slow_elastic(entries: CacheEntries, keep: int, start_size: int):
    """The intended rule, entry by entry: (numbers, keys)."""
    (scores,) = entries.signals.values()
    length = len(scores)
    start = min(start_size, keep - 1)
    middle = sorted(range(start, length - 1), key=lambda i: (-scores[i].item(), i))
    anchors = sorted(middle[: keep - 1 - start])
    members = {i: [i] for i in [*range(start), *anchors, length - 1]}
    for i in sorted(middle[keep - 1 - start :]) if anchors else ():
        members[min(anchors, key=lambda a: (abs(a - i), a))].append(i)
    means = [entries.keys[:, group].mean(1) for _, group in sorted(members.items())]
    return sorted(members), torch.stack(means, 1)


def test_elastic_by_hand():
    """The start and the last entry stay, whatever their scores; 2 and 6 are the best others.

    1 and 3 are nearest to 2, 5 to 6, and 4, half way, goes to the lower one.
    """
    entries = scored(0.0, 0.1, 0.9, 0.2, 0.3, 0.4, 0.8, 0.0)
    done = ElasticCache().compress(entries, 4)
    assert done.kept.tolist() == [0, 2, 6, 7]
    wanted = torch.tensor([1, (10 + 100 + 1e3 + 1e4) / 4, (1e5 + 1e6) / 2, 1e7])
    torch.testing.assert_close(done.keys[0, :, 0], wanted)
    torch.testing.assert_close(done.values[0, :, 0], -wanted)


def test_elastic_keeps_in_order_last_start_best():
    entries = scored(0.0, 0.1, 0.9, 0.2, 0.3, 0.0)
    kept = [ElasticCache(start_size=2).compress(entries, n).kept.tolist() for n in range(1, 6)]
    assert kept == [[5], [0, 5], [0, 1, 5], [0, 1, 2, 5], [0, 1, 2, 4, 5]]


def test_elastic_without_anchors_drops_unmerged():
    entries = scored(0.5, 0.1, 0.9, 0.2)
    for keep, start_size in ((1, 0), (1, 1), (2, 1), (3, 2), (3, 9)):
        done = ElasticCache(start_size=start_size).compress(entries, keep)
        assert len(done.kept) == keep
        assert done.keys is None and done.values is None


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=20),
    st.integers(0, 4),
    st.integers(1, 19),
)
def test_elastic_follows_its_rule(received, start_size, keep):
    """Few different scores, so that many are equal."""
    length = len(received)
    keep = min(keep, length - 1)
    scores = torch.tensor(received, dtype=torch.float32)
    entries = entries_of(seeded(3, length, 2), seeded(3, length, 2, seed=1), received=scores)
    done = ElasticCache(start_size=start_size).compress(entries, keep)
    kept, keys = slow_elastic(entries, keep, start_size)
    assert done.kept.tolist() == kept
    ours = entries.keys[:, done.kept] if done.keys is None else done.keys
    torch.testing.assert_close(ours, keys)


def test_elastic_values_may_be_narrower_than_keys():
    keys, values = seeded(2, 8, 6), seeded(2, 8, 3)
    done = ElasticCache().compress(entries_of(keys, values, received=torch.ones(8)), 5)
    assert done.keys.shape == (2, 5, 6) and done.values.shape == (2, 5, 3)


def test_elastic_official_differs_in_both_indices():
    """Ranks of 1..4 are 3, 0, 1, 2. The last two of these, 1 and 2, are taken for what stays: 2
    and 3. The other two, 0 and 3, are merged though 1 and 4 are dropped."""
    entries = scored(0.0, 0.9, 0.1, 0.2, 0.3, 0.0)
    done = OfficialElasticCache().compress(entries, 4)
    assert done.kept.tolist() == [0, 2, 3, 5]
    wanted = torch.tensor([1, (1 + 100) / 2, (1e3 + 1e3) / 2, 1e5])
    torch.testing.assert_close(done.keys[0, :, 0], wanted)
    assert ElasticCache().compress(entries, 4).kept.tolist() == [0, 1, 4, 5]


def test_elastic_waits_for_nothing():
    entries = made("tvvvvvvvvvtt")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = entries_of(
            mode.from_tensor(entries.keys),
            mode.from_tensor(entries.values),
            received=mode.from_tensor(entries.signals[ReceivedInLayer(0)]),
        )
        assert ElasticCache().compress(fake, 7).keys.shape == (2, 7, 4)


# --- Elastic cache: decoding --------------------------------------------------------------------


def decoded(call, prompt: int, kept: int, steps: int) -> tuple[list[int | None], list[int]]:
    """The slots emptied after each step, and what is then stored."""
    stored, slots, lengths = kept, [], []
    for step in range(1, steps + 1):
        stored += 1
        slot = call.evict(prompt=prompt, kept=kept, stored=stored, seen=prompt + step)
        slots.append(slot)
        stored -= slot is not None
        lengths.append(stored)
    return slots, lengths


def test_elastic_evicts_by_hand():
    """A half is kept: every second new token costs an entry, always the one 25 before the end of
    the compressed prompt."""
    slots, lengths = decoded(ElasticCache(), prompt=100, kept=50, steps=6)
    assert slots == [None, 25, None, 25, None, 25]
    assert lengths == [51, 51, 52, 52, 53, 53]
    slots, _ = decoded(ElasticCache(distance=-1), prompt=90, kept=60, steps=6)
    assert slots == [None, None, 59, None, None, 59]
    slots, _ = decoded(ElasticCache(distance=7), prompt=90, kept=30, steps=4)
    assert slots == [None, 7, 7, None]


def test_elastic_evicts_nothing_where_everything_was_kept():
    assert decoded(ElasticCache(), prompt=40, kept=40, steps=9)[0] == [None] * 9


@given(st.integers(2, 300), st.integers(1, 299), st.integers(0, 6), st.integers(-40, 60))
def test_elastic_keeps_its_share_and_the_newest(prompt, kept, start_size, distance):
    kept = min(kept, prompt - 1)
    call = ElasticCache(start_size=start_size, distance=distance)
    stored = kept
    for seen in range(prompt + 1, prompt + 60):
        stored += 1
        slot = call.evict(prompt=prompt, kept=kept, stored=stored, seen=seen)
        assert slot is None or 0 <= slot < stored - 1
        stored -= slot is not None
        assert stored == -(-seen * kept // prompt)  # the share, rounded up, and not one more


def test_elastic_slot_spares_the_start():
    call = ElasticCache(start_size=4, distance=-25)
    assert call.evict(prompt=100, kept=10, stored=12, seen=102) == 4
    assert call.slot(kept=2, stored=4) == 2  # no room for all of the start


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_elastic_evicts_as_officially(path):
    """In whole numbers as the official code does in floating point."""
    golden = load(path)
    keep, length = golden.arrays["k_out"].shape[2], golden.params["L"]
    call = OfficialElasticCache(start_size=golden.params["start_size"])
    stored = keep
    for seen, removed in enumerate(golden.arrays["removed"].tolist(), start=length + 1):
        stored += 1
        share = length - golden.params["forget_num"]
        ours = call.evict(prompt=length, kept=share, stored=stored, seen=seen)
        assert (ours is None) == (removed == -1)
        assert ours is None or call.slot(keep, stored) == removed
        stored -= ours is not None
    assert stored == golden.arrays["cache_len"][-1]


# --- Token select -------------------------------------------------------------------------------

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


# --- Visual press -------------------------------------------------------------------------------


class Attention(torch.nn.Module):
    """A layer's attention module with its own scale."""

    def __init__(self, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling


class FirstValues:
    """As kvpress's ScorerPress: higher scores stay."""

    def __init__(self, shape=None) -> None:
        self.calls, self.shape = [], shape

    def __eq__(self, other: object) -> bool:  # as a dataclass: by value, so without a hash
        return type(self) is type(other)

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        self.calls.append((module, hidden_states, keys, values, attentions, kwargs))
        return values[..., 0] if self.shape is None else torch.zeros(self.shape)


def kept_by(press, entries: CacheEntries, keep: int, **fields) -> list[list[int]]:
    return VisualPress(press=press, **fields).compress(entries, keep).kept.tolist()


def test_small_keys_stay_in_each_head():
    lengths = torch.tensor([[9.0, 1, 3, 2, 9, 9], [0, 4, 2, 3, 0, 9]])
    keys = torch.stack([lengths, torch.zeros(2, 6)], -1)
    visual = torch.tensor([False, True, True, True, True, False])
    entries = entries_of(keys, keys, visual=visual)
    assert kept_by("knorm", entries, 4) == [[0, 1, 3, 5], [0, 2, 4, 5]]
    assert kept_by("knorm", entries, 3) == [[0, 1, 5], [0, 4, 5]]


def test_received_attention_is_the_same_for_all_heads():
    visual = torch.tensor([False, True, True, True, False])
    keys = torch.ones(2, 5, 2)
    entries = entries_of(
        keys, keys, visual=visual, received=torch.tensor([3.0, 0.1, 0.3, 0.2, 0.0])
    )
    assert kept_by("received", entries, 4) == [[0, 2, 3, 4]] * 2


def test_text_between_and_scores_without_limits():
    """Text stays where an infinite score stands against it, or a score that is none."""
    for junk in (math.inf, -math.inf, math.nan):
        values = torch.tensor([0.0, junk, 0, 3, junk, 5, 0])[None, :, None]
        visual = torch.tensor([True, True, False, True, True, True, False])
        entries = entries_of(values, values, visual=visual)
        (row,) = kept_by(FirstValues(), entries, 4)
        assert len(set(row)) == 4 and {2, 6} <= set(row)


def slow_observed(entries: CacheEntries, window: int, kernel: int, pooling: str) -> torch.Tensor:
    heads, length, width = entries.keys.shape
    group = len(entries.queries) // heads
    last_visual = max(i for i in range(length) if entries.visual[i])
    rows = [r for r in range(max(0, length - window), length) if r > last_visual] or [length - 1]
    scale = getattr(entries.attention, "scaling", 1 / math.sqrt(width))
    scores = torch.zeros(heads, length)
    for h, q in enumerate(entries.queries):
        for r in rows:
            seen = entries.keys[h // group, : r + 1]
            scores[h // group, : r + 1] += (seen @ q[r] * scale).softmax(0) / len(rows) / group
    scores[:, ~entries.visual] = 0
    side = kernel // 2
    padded = torch.nn.functional.pad(scores, (side, side))
    windows = torch.stack([padded[:, i : i + length] for i in range(kernel)])
    return windows.mean(0) if pooling == "avg" else windows.amax(0)


@given(
    st.text("vvt", min_size=2, max_size=20).filter(lambda s: "v" in s),
    st.integers(1, 25),
    st.sampled_from([1, 3, 5]),
    st.sampled_from(["avg", "max"]),
    st.sampled_from([None, Attention(2.0)]),
)
def test_snapkv_follows_its_rule(visual, window, kernel, pooling, attention):
    base = made(visual)
    entries = entries_of(
        base.keys, base.values, queries=base.queries, visual=base.visual, attention=attention
    )
    ours = observed(entries, window, kernel, pooling)
    torch.testing.assert_close(ours, slow_observed(entries, window, kernel, pooling))


def test_snapkv_by_hand():
    """The last row looks at 3, the row before it at 1, and the visual row at 2 does not count.

    With pooling the neighbours of 3 and of 1 share their attention: 2 has both.
    """
    one = torch.eye(6) * 20
    queries = torch.stack([one[0], one[0], one[0], one[2], one[1], one[3]])[None]
    visual = torch.tensor([False, True, True, True, False, False])
    entries = entries_of(torch.eye(6)[None], torch.eye(6)[None], queries=queries, visual=visual)
    fields = {"pooling": "max", "kernel": 1}
    assert kept_by("snapkv", entries, 5, **fields) == [[0, 1, 3, 4, 5]]
    assert kept_by("snapkv", entries, 4, window=1, **fields) == [[0, 3, 4, 5]]
    assert kept_by("snapkv", entries, 4, pooling="avg", kernel=3) == [[0, 2, 4, 5]]


def test_snapkv_takes_the_mean_of_heads_with_the_same_keys():
    """Head 0 prefers 1 by little, head 1 prefers 2 by much."""
    keys = torch.zeros(1, 4, 2)
    keys[0, 1, 0], keys[0, 2, 1] = 1, 1
    queries = torch.zeros(2, 4, 2)
    queries[0, 3], queries[1, 3] = torch.tensor([1.0, 0]), torch.tensor([0.0, 5])
    visual = torch.tensor([False, True, True, False])
    for order, best in ((queries, 2), (queries.flip(0), 2), (queries[:1], 1)):
        entries = entries_of(keys, keys, queries=order, visual=visual)
        assert kept_by("snapkv", entries, 3, kernel=1) == [[0, best, 3]]


def test_a_press_of_kvpress_is_asked_as_there():
    entries = made("tvvvtvt", heads=3)
    press = FirstValues()
    (kept,) = {tuple(map(tuple, kept_by(press, entries, 5))) for _ in range(2)}
    module, hidden, keys, values, attentions, kwargs = press.calls[0]
    assert module is entries.attention and attentions is None
    assert torch.equal(hidden, entries.hidden[None])
    assert torch.equal(keys, entries.keys[None]) and torch.equal(values, entries.values[None])
    cos, sin = kwargs["position_embeddings"]
    assert torch.equal(cos, entries.rotary[0][None]) and torch.equal(sin, entries.rotary[1][None])
    for head, row in enumerate(kept):
        best = sorted((1, 2, 3, 5), key=lambda i: -entries.values[head, i, 0])[:2]
        assert list(row) == sorted([0, 4, 6, *best])


def test_an_object_is_named_in_result_files():
    call = VisualPress(press=FirstValues())
    assert json.loads(json.dumps(call.fields()))["press"] == "FirstValues"
    assert VisualPress().fields() == {
        "press": "snapkv",
        "window": 32,
        "kernel": 5,
        "pooling": "avg",
    }
    assert hash(call) == hash(VisualPress(press=FirstValues()))
    assert call == VisualPress(press=FirstValues()) != VisualPress()
    assert call.needs(CLIP_L) == VisualPress().needs(CLIP_L) == ()


def test_positions():
    assert VisualPress.positions == "original"
    assert ElasticCache.positions == TokenSelect.positions == "repacked"


# --- Errors -------------------------------------------------------------------------------------


def test_text_needs_room():
    entries = made("tvvvtvt")
    for keep in (1, 3):
        with pytest.raises(BudgetError, match=rf"all 3 text .* of {keep} .* least .* is 4"):
            VisualPress().compress(entries, keep)
    assert VisualPress().compress(entries, 4).kept.shape == (2, 4)


@pytest.mark.parametrize("shape", [(2, 7), (1, 7, 2), (1, 2, 6)])
def test_scores_of_another_shape_are_refused(shape):
    with pytest.raises(MethodFieldError, match=r"FirstValues returned shape .*\(1, 2, 7\)"):
        VisualPress(press=FirstValues(shape)).compress(made("tvvvtvt"), 5)


def test_press_must_score():
    with pytest.raises(MethodFieldError, match="Did you mean: snapkv"):
        VisualPress(press="snapvk")
    with pytest.raises(MethodFieldError, match="does not score: use snapkv, knorm, received"):
        VisualPress(press=3)
    with pytest.raises(MethodFieldError, match="not its class"):
        VisualPress(press=FirstValues)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("elastic_cache", "start_size", -1),
        ("elastic_cache", "start_size", True),
        ("elastic_cache", "distance", 1.5),
        ("token_select", "n_init", -1),
        ("token_select", "n_local", 0),
        ("token_select", "top_k", 0),
        ("token_select", "pool", 2),
        ("token_select", "pool", 0),
        ("visual_press", "window", 0),
        ("visual_press", "kernel", 4),
        ("visual_press", "kernel", 0),
        ("visual_press", "pooling", "mean"),
        ("visual_press", "press", None),
    ],
)
def test_impossible_fields(name, field, value):
    with pytest.raises(MethodFieldError, match=f"{field}="):
        method_class(name)(**{field: value})


@pytest.mark.parametrize("name", ["elastic_cache", "visual_press"])
def test_a_budget_is_needed(name):
    with pytest.raises(BudgetError, match=f"{name} needs a budget"):
        method(name)
    assert method(name, keep_ratio=0.5).budget is not None
