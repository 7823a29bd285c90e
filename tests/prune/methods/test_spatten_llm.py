"""SpAtten-LLM: what stays at both ends, and each head's best in between."""

import pytest
import torch
from kit.entries import entries_of, made
from kit.golden import Golden, Runner, assert_equal
from vlmprune.prune.contract import Method
from vlmprune.prune.errors import MethodFieldError
from vlmprune.prune.registry import method_class

SpAttenLLM = method_class("spatten_llm")


def _spatten_llm(golden: Golden, method: Method) -> None:
    """The rows' logits become keys, and a query of ones sums them."""
    params, length = golden.params, golden.params["L"]
    for logits, wanted in zip(golden.arrays["logits"], golden.arrays["kept"], strict=True):
        if params["unchanged"]:  # it fits: no method is asked
            assert length + params["num_coming"] <= params["cache_size"]
            assert_equal(torch.arange(length).expand_as(wanted), wanted)
            continue
        keys = logits.transpose(1, 2)  # (H, S, R)
        queries = torch.ones_like(keys) * keys.shape[-1] ** 0.5
        entries = entries_of(keys, keys, queries=queries)
        assert_equal(method.compress(entries, wanted.shape[-1]).kept, wanted)


GOLDEN = {
    "spatten_llm": Runner(
        "spatten_llm",
        lambda p: {
            "start_size": p["start_size"],
            "recent_size": p["recent_size"],
            "coming": p["num_coming"],
        },
        _spatten_llm,
    ),
}


def _entries(*scores: list[float]):
    """Entries of a key head each, whose logits with the last query are these."""
    keys = torch.tensor(scores)[:, :, None]
    return entries_of(keys, keys, queries=torch.ones_like(keys))


def test_every_head_keeps_its_own():
    entries = _entries([9, 1, 5, 3, 4, 0, 0, 8], [0, 5, 1, 4, 3, 9, 0, 0])
    kept = SpAttenLLM(start_size=1, recent_size=2).compress(entries, 5).kept
    assert kept.tolist() == [[0, 2, 4, 6, 7], [0, 1, 5, 6, 7]]
    # A token is about to come: one recent entry less, one important one more.
    kept = SpAttenLLM(start_size=1, recent_size=2, coming=1).compress(entries, 5).kept
    assert kept.tolist() == [[0, 2, 3, 4, 7], [0, 1, 3, 5, 7]]


def test_half_of_what_the_start_leaves_is_recent():
    entries = _entries([0.0, 0, 7, 6, 5, 4, 0, 0, 0, 0])
    for keep, kept in (
        (9, [0, 1, 2, 3, 4, 5, 7, 8, 9]),
        (6, [0, 1, 2, 3, 8, 9]),
        (3, [0, 1, 9]),
        (2, [0, 9]),
        (1, [9]),
    ):
        assert SpAttenLLM(start_size=2).compress(entries, keep).kept.tolist() == [kept]


def test_where_there_is_no_room_the_last_come_first():
    entries = _entries([0.0, 1, 2, 3, 4, 5])
    few = SpAttenLLM(start_size=2, recent_size=3)
    assert few.compress(entries, 4).kept.tolist() == [[0, 3, 4, 5]]
    assert few.compress(entries, 2).kept.tolist() == [[4, 5]]


def test_query_heads_that_share_keys_are_averaged():
    entries = made("tvvvvvvt", heads=1, group=2)
    logits = entries.queries[:, -1] @ entries.keys[0].T
    best = logits.mean(0)[1:-1].argmax() + 1
    kept = SpAttenLLM(start_size=1, recent_size=1).compress(entries, 3).kept
    assert kept.tolist() == [[0, int(best), 7]]


@pytest.mark.parametrize("field", ["start_size", "recent_size", "coming"])
@pytest.mark.parametrize("wrong", [-1, 0.5])
def test_wrong_fields_are_refused(field, wrong):
    with pytest.raises(MethodFieldError, match=f"{field}={wrong} .*give a number"):
        SpAttenLLM(**{field: wrong})
