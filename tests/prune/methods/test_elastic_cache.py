"""ElasticCache: its rule by hand and against a slow reading, and what it evicts while decoding."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kit.entries import entries_of, made, seeded
from kit.golden import Golden, Runner, assert_equal, load
from kit.paths import TESTS
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from vlmprune.prune.contract import CacheEntries, ReceivedInLayer
from vlmprune.prune.methods.cache.elastic_cache import ElasticCache
from vlmprune.prune.ops.topk import ascending


@dataclass(frozen=True, kw_only=True)
class OfficialElasticCache(ElasticCache):
    """The ranks of the last candidates are taken for the numbers of those that stay: p stays if
    the p-th lowest score is one of theirs. The numbers of dropped entries lack the start."""

    def _parted(self, scores: Tensor, start: int, count: int) -> tuple[Tensor, Tensor]:
        ranks = scores[start:-1].float().argsort(stable=True).argsort()
        dropped, anchors = ranks.split([len(ranks) - count, count])
        return ascending(anchors) + start, ascending(dropped)

    def slot(self, kept: int, stored: int) -> int:
        return super().slot(kept + 1, stored)  # one more was dropped than counted


def _elastic_cache(golden: Golden, method: Any) -> None:
    a, params = golden.arrays, golden.params
    keep = a["k_out"].shape[2]
    for layer in range(params["layers"]):
        received = a["attn"][layer].mean(0).sum(0)  # nothing is above the diagonal
        entries = entries_of(a["k"][layer], a["v"][layer], layer=layer, received=received)
        done = method.compress(entries, keep)
        assert_equal(done.kept, a["kept"][layer])
        torch.testing.assert_close(done.keys, a["k_out"][layer])
        torch.testing.assert_close(done.values, a["v_out"][layer])

    stored, lengths, removed = keep, [keep], []
    for seen in range(params["L"] + 1, params["L"] + 1 + len(a["removed"])):
        stored += 1
        over = int(stored - seen * (1 - params["ratio"]))  # as officially, in floating point
        removed.append(method.slot(keep, stored) if over >= 1 else -1)
        stored -= over >= 1
        lengths.append(stored)
    assert removed == a["removed"].tolist()
    assert lengths == a["cache_len"].tolist()


GOLDEN = {
    "elasticcache": Runner(
        "elastic_cache",
        lambda p: {key: p[key] for key in ("start_size", "distance")},
        _elastic_cache,
        OfficialElasticCache,
    ),
}
FILES = sorted((TESTS / "golden").glob("elasticcache__*.npz"))


def scored(*received: float) -> CacheEntries:
    """One head with keys 1, 10, 100... so that sums tell their members; values are negative."""
    keys = 10.0 ** torch.arange(len(received))[None, :, None]
    return entries_of(keys, -keys, received=torch.tensor(received))


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
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
