"""What a method returns is checked: one error that names the method, the rule and the value."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import vlmprune
from kit import zoo
from vlmprune.prune.answers.entries import check_attended, check_compressed
from vlmprune.prune.answers.functions import asked_rows, check_read
from vlmprune.prune.budget import MethodCall
from vlmprune.prune.contract import (
    Attending,
    BeforeLLM,
    CacheEntries,
    Compressed,
    Compressing,
    Cut,
    Features,
    InDecoder,
    Neurons,
    Place,
    Selection,
    TextAttention,
)
from vlmprune.prune.errors import MethodAnswerError
from vlmprune.prune.registry import is_shipped, method, method_class
from vlmprune.prune.select import select
from vlmprune.prune.thinned import core_neurons, heads
from vlmprune.prune.tiling import Tiling

N, KEEP, D = 12, 4, zoo.DECODER["hidden_size"]
GOOD = Selection(kept=torch.tensor([1, 3, 4, 9]))


@dataclass(frozen=True, kw_only=True)
class Mine(BeforeLLM):
    """Returns what it is told to."""

    name: ClassVar[str] = "mine"
    finds_count: ClassVar[bool] = True
    answer: Any = field(default=None, compare=False)

    def needs(self, shape):
        return (Features(),)

    def select(self, tokens, keep):
        return self.answer(tokens, keep) if callable(self.answer) else self.answer

    def select_adaptive(self, tokens):
        return self.select(tokens, 0)

    def most(self, num_tokens):
        return num_tokens // 2


@dataclass(frozen=True, kw_only=True)
class MineInBatch(Mine):
    """Returns a whole batch."""

    def select_batch(self, asked):
        return self.answer


def tokens(layer: int = 0):
    from vlmprune.prune.contract import VisualTokens

    return VisualTokens(
        num_tokens=N,
        tiling=Tiling.single(3, 4),
        shape=zoo.CLIP,
        signals={Features(): torch.randn(N, D)},
        place=Place.DECODER if layer else Place.BEFORE_LLM,
        layer=layer,
    )


def refused(call, *words: str) -> str:
    with pytest.raises(MethodAnswerError) as caught:
        call()
    message = str(caught.value)
    assert isinstance(caught.value, vlmprune.VlmpruneError)
    assert isinstance(caught.value, ValueError)
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"
    return message


def rows(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers)


WRONG = {
    "a list": ([1, 3, 4, 9], "list [1, 3, 4, 9]", "a Selection"),
    "a tensor": (rows(1, 3, 4, 9), "int64 (4,)", "a Selection"),
    "nothing": (None, "None", "a Selection"),
    "kept is a list": (Selection(kept=[1, 3, 4, 9]), "kept list", "tensor of int64"),
    "floats": (Selection(kept=rows(1, 3, 4, 9).float()), "float32 (4,)", "int64"),
    "a mask": (Selection(kept=torch.ones(N, dtype=torch.bool)), "bool (12,)", "int64"),
    "int32": (Selection(kept=rows(1, 3, 4, 9).int()), "int32", "int64"),
    "a column": (Selection(kept=rows(1, 3, 4, 9)[:, None]), "(4, 1)", "one dimension"),
    "too few": (Selection(kept=rows(1, 3)), "2 tokens (kept) for a count of 4", "exactly"),
    "too many": (Selection(kept=rows(1, 3, 4, 8, 9)), "5 tokens", "count of 4"),
    "twice": (Selection(kept=rows(1, 3, 3, 9)), "3 twice", "once"),
    "unsorted": (Selection(kept=rows(1, 9, 4, 3)), "9 before 4", "sort"),
    "beyond the last": (Selection(kept=rows(1, 3, 4, 12)), "with 12", "0 to 11"),
    "negative": (Selection(kept=rows(-1, 3, 4, 9)), "with -1", "0 to 11"),
    "order too long": (
        Selection(kept=rows(1, 3, 4), order=rows(3, 1, 4, -1)),
        "an order of 4 rows and 3 kept tokens",
        "features",
    ),
    "order of others": (
        Selection(kept=rows(1, 3, 4, 9), order=rows(9, 4, 3, 2)),
        "order [9, 4, 3, 2] of kept [1, 3, 4, 9]",
    ),
    "order of -2": (
        Selection(
            kept=rows(1, 3, 4),
            order=rows(3, -2, 1, 4),
            features=torch.ones(4, D),
            projected=True,
        ),
        "order [3, -2, 1, 4]",
    ),
    "features of other rows": (
        Selection(kept=GOOD.kept, features=torch.ones(3, D), projected=True),
        "float32 (3, 64)",
        "each of the 4 rows",
    ),
    "features of another width": (
        Selection(kept=GOOD.kept, features=torch.ones(4, D - 1), projected=True),
        "(4, 63)",
        "width 64",
    ),
    "whole numbers as features": (
        Selection(kept=GOOD.kept, features=torch.ones(4, D).long(), projected=True),
        "int64 (4, 64)",
        "floats",
    ),
    "features for a projector that was not asked about": (
        Selection(kept=GOOD.kept, features=torch.ones(4, D)),
        *("float32 (4, 64) for the projector", "EncoderFeatures", "projected=True"),
    ),
    "a vector as features": (Selection(kept=GOOD.kept, features=torch.ones(4)), "float32 (4,)"),
    "rows without features": (Selection(kept=GOOD.kept, rows=rows(0)), "rows without features"),
    "a row that is not there": (
        Selection(kept=GOOD.kept, features=torch.ones(1, D), rows=rows(4), projected=True),
        "rows with 4",
        "0 to 3",
    ),
    "a row twice": (
        Selection(kept=GOOD.kept, features=torch.ones(2, D), rows=rows(1, 1), projected=True),
        "rows [1, 1]",
    ),
    "a bare row": (
        Selection(
            kept=rows(1, 3, 4),
            order=rows(-1, 1, 3, 4),
            features=torch.ones(1, D),
            rows=rows(2),
            projected=True,
        ),
        "row 0 with neither token nor features",
    ),
    "scores of the kept": (
        Selection(kept=GOOD.kept, scores=torch.ones(4)),
        *("scores of float32 (4,)", "(12,)"),
    ),
    "ranks as scores": (Selection(kept=GOOD.kept, scores=torch.arange(N)), "scores of int64"),
    "groups of three": (
        Selection(kept=GOOD.kept, groups=torch.zeros(3, 2).long()),
        "groups",
        "(2, G)",
    ),
    "groups of floats": (Selection(kept=GOOD.kept, groups=torch.zeros(2, 2)), "groups of float32"),
    "groups of no row": (Selection(kept=GOOD.kept, groups=rows(4, 0)[:, None]), "groups[0] with 4"),
    "groups of no token": (
        Selection(kept=GOOD.kept, groups=rows(0, 12)[:, None]),
        "groups[1] with 12",
    ),
    "groups out of order": (
        Selection(kept=GOOD.kept, groups=torch.tensor([[1, 0], [2, 3]])),
        "sorted by row",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_answer_names_the_method_the_rule_and_the_value(what):
    answer, *words = WRONG[what]
    message = refused(lambda: select(Mine(answer=answer), tokens(), KEEP), "mine.select ", *words)
    assert "Return Selection(kept=...) with the 4 numbers, sorted" in message


def test_a_right_answer_is_taken():
    assert select(Mine(answer=GOOD), tokens(), KEEP) == GOOD
    merged = Selection(
        kept=rows(1, 3, 4),
        order=rows(4, -1, 3, 1),
        features=torch.ones(2, D),
        rows=rows(0, 1),
        projected=True,
        groups=torch.tensor([[0, 0, 1], [4, 2, 7]]),
    )
    found = select(Mine(answer=merged), tokens(), KEEP)
    assert found is merged


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([GOOD], ("1 answers", "all 2 questions")),
        ([GOOD] * 3, ("3 answers",)),
        (GOOD, ("Selection", "all 2 questions")),
        (iter([GOOD, GOOD]), ("list_iterator",)),
        ([GOOD, rows(1)], ("int64 (1,)", "a Selection")),
    ],
)
def test_a_batch_is_answered_whole(answer, words):
    from vlmprune.prune.select import select_all

    asked = [tokens(), tokens()]
    refused(
        lambda: select_all(MineInBatch(answer=answer), asked, [KEEP, KEEP]),
        "mine.select_batch",
        *words,
    )


@pytest.mark.parametrize("count", [0, 7])
def test_a_count_of_the_methods_own_lies_between_one_and_most(count):
    answer = Selection(kept=torch.arange(count))
    refused(
        lambda: select(Mine(answer=answer), tokens(), None),
        *("mine.select_adaptive", f"{count} of 12 tokens", "1 to 6"),
    )
    assert select(Mine(answer=GOOD), tokens(), None) is GOOD


# --- who is looked at -----------------------------------------------------------------------------


def test_only_shipped_classes_are_shipped():
    assert is_shipped(method_class("divprune"))
    assert not is_shipped(Mine)
    assert not is_shipped(type("Theirs", (method_class("divprune"),), {"__module__": "theirs"}))


def test_numbers_of_shipped_methods_are_looked_at_on_demand_and_shapes_always(monkeypatch):
    shipped = method("grid", keep_tokens=KEEP)
    cls = type(shipped.method)
    twice = Selection(kept=rows(1, 3, 3, 9))
    monkeypatch.setattr(cls, "select_batch", lambda self, asked: [twice for _ in asked])
    model, case = zoo.CASES["llava-clip-llama"].model(), zoo.CASES["llava-clip-llama"]
    vlmprune.patch(model, shipped)
    model(**case.inputs())  # not looked at
    vlmprune.patch(model, shipped, debug=True)
    refused(lambda: model(**case.inputs()), "grid.select", "3 twice")
    vlmprune.patch(model, "grid", keep_tokens=KEEP + 1)
    refused(lambda: model(**case.inputs()), "4 tokens (kept) for a count of 5")


# --- through a model ------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Deep(InDecoder):
    """Returns what it is told to."""

    name: ClassVar[str] = "deep"
    answer: Any = field(default=None, compare=False)
    rows: Any = "last"

    def needs(self, shape):
        return (TextAttention(1, rows=self.rows),)

    def cuts(self, shape):
        return (Cut(Place.DECODER, 2),)

    def select(self, tokens, keep):
        return self.answer(tokens, keep)


@dataclass(frozen=True, kw_only=True)
class OnCache(Compressing):
    """Returns what it is told to."""

    name: ClassVar[str] = "on_cache"
    answer: Any = field(default=None, compare=False)
    evicts: Any = None

    def needs(self, shape):
        return ()

    def compress(self, entries, keep):
        return self.answer(entries, keep)

    def evict(self, *, prompt, kept, stored, seen):
        return self.evicts


@dataclass(frozen=True, kw_only=True)
class Looks(Attending):
    """Returns what it is told to."""

    name: ClassVar[str] = "looks"
    answer: Any = field(default=None, compare=False)

    def attended(self, query, keys, valid, keep):
        return self.answer(keys, keep)


def first(tokens, keep):
    return Selection(kept=torch.arange(keep))


def newest(entries, keep):
    return Compressed(kept=torch.arange(keep))


@pytest.mark.parametrize("case", [zoo.CASES["llava-clip-llama"], zoo.CASES["llava_next"]])
@pytest.mark.parametrize(
    ("made", "words"),
    [
        (
            Mine(answer=lambda tokens, keep: Selection(kept=torch.zeros(keep).long())),
            ("mine.select", "0 twice"),
        ),
        (
            Deep(answer=lambda tokens, keep: Selection(kept=torch.arange(keep).flip(0))),
            ("deep.select", "before"),
        ),
        (
            Deep(
                answer=lambda tokens, keep: Selection(
                    kept=torch.arange(keep), features=torch.ones(keep, 3)
                )
            ),
            ("deep.select", "hidden states have width 64"),
        ),
        (Deep(answer=first, rows=lambda v, t: t[:, 0]), ("rule for rows", "float32", "bool")),
        (Deep(answer=first, rows=lambda v, t: t[:, 0] != t[:, 0]), ("asks none of the 3",)),
        (
            OnCache(answer=lambda entries, keep: Compressed(kept=torch.zeros(keep).long())),
            ("on_cache.compress", "0 twice"),
        ),
        (OnCache(answer=lambda entries, keep: torch.arange(keep)), ("a Compressed",)),
        (OnCache(answer=newest, evicts=10**4), ("on_cache.evict", "10000", "entry")),
        (OnCache(answer=newest, evicts=rows(0)), ("on_cache.evict", "tensor")),
        (
            Looks(answer=lambda keys, keep: (torch.zeros(len(keys), 3).long(), None)),
            ("looks.attended", "3 entries", "budget"),
        ),
    ],
    ids=lambda made: "",
)
def test_wrong_answers_in_a_model(case, made, words):
    model = case.model()
    with vlmprune.patch(model, MethodCall(made, vlmprune.method("grid", keep_ratio=0.5).budget)):
        refused(lambda: model.generate(**case.inputs(), max_new_tokens=3), *words)


# --- the rest by hand -----------------------------------------------------------------------------


def entries() -> CacheEntries:
    return CacheEntries(
        layer=0,
        keys=torch.randn(2, 9, 4),
        values=torch.randn(2, 9, 4),
        queries=torch.randn(4, 9, 4),
        visual=torch.ones(9, dtype=torch.bool),
        signals={},
        attention=None,
        hidden=torch.randn(9, 8),
        rotary=(torch.ones(9, 4), torch.ones(9, 4)),
    )


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (Compressed(kept=[0, 1, 2]), ("kept list", "int64")),
        (Compressed(kept=rows(0, 1)), ("2 entries for a count of 3",)),
        (Compressed(kept=rows(0, 1, 9)), ("kept with 9", "0 to 8")),
        (Compressed(kept=rows(0, 2, 1)), ("2 before 1",)),
        (Compressed(kept=rows(0, 1, 2).expand(3, 3)), ("int64 (3, 3)", "(2, K)")),
        (
            Compressed(kept=torch.tensor([[0, 1, 2], [0, 2, 2]])),
            ("2 twice",),
        ),
        (
            Compressed(kept=rows(0, 1, 2), keys=torch.randn(2, 4, 4)),
            ("keys of float32 (2, 4, 4)", "(2, 3, 4)"),
        ),
        (Compressed(kept=rows(0, 1, 2), values=torch.ones(2, 3, 4).long()), ("values of int64",)),
    ],
)
def test_compressed(answer, words):
    refused(lambda: check_compressed(OnCache(), entries(), 3, answer, True), *words)


@pytest.mark.parametrize(
    "kept", [rows(0, 4, 8), torch.tensor([[0, 1, 2], [3, 4, 8]])], ids=["all heads", "each head"]
)
def test_compressed_as_it_should_be(kept):
    answer = Compressed(kept=kept, keys=torch.randn(2, 3, 4))
    assert check_compressed(OnCache(), entries(), 3, answer, True) is answer


VALID = torch.tensor([[False, True, True, True, True], [True] * 5])


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (rows(1, 2, 3), ("int64 (3,)", "a pair")),
        ((rows(1, 2, 3), None), ("(3,)", "(2, 1 to 5)")),
        ((torch.ones(2, 3), None), ("float32 (2, 3)", "int64")),
        ((rows(1, 2, 3).expand(2, 3), torch.ones(2, 3)), ("which of them count", "bools")),
        ((rows(1, 3, 2).expand(2, 3), None), ("3 before 2",)),
        ((rows(1, 2, 5).expand(2, 3), None), ("columns with 5", "0 to 4")),
        ((rows(0, 2, 3).expand(2, 3), None), ("padding",)),
        ((rows(1, 2).expand(2, 2), None), ("2 entries of row 0", "budget is 3 of 4")),
    ],
)
def test_attended(answer, words):
    keys, keep = torch.randn(2, 2, 5, 4), rows(3, 3)
    refused(lambda: check_attended(Looks(), keys, VALID, keep, answer, True), *words)


def test_attended_as_it_should_be():
    keys, keep = torch.randn(2, 2, 5, 4), rows(3, 9)
    columns = torch.tensor([[1, 2, 4, 0, 0], [0, 1, 2, 3, 4]])
    counts = torch.tensor([[True, True, True, False, False], [True] * 5])
    found = check_attended(Looks(), keys, VALID, keep, (columns, counts), True)
    assert found == (columns, counts)
    assert check_attended(Looks(), keys, None, rows(5, 7), None, True) is None
    refused(lambda: check_attended(Looks(), keys, None, rows(5, 4), None, True), "None", "than 4")


@pytest.mark.parametrize("given", [torch.ones(4), torch.ones(5, 1), [1.0] * 5, None])
def test_numbers_that_are_read_from_a_module(given):
    signal = Neurons(1, read=lambda visual, text: given)
    refused(lambda: check_read(signal, given, 5), "Neurons", "(5,)")


def test_rules_for_rows():
    columns = rows(4, 5, 6)
    assert asked_rows(columns, columns > 4).tolist() == [5, 6]
    refused(lambda: asked_rows(columns, columns > 9), "none of the 3")
    refused(lambda: asked_rows(columns, (columns > 4)[:2]), "bool (2,)", "(3,)")


class Counts(Deep):
    def counts(self, shape, num_tokens, keep):
        return (keep, keep)


def test_a_count_for_each_cut():
    case = zoo.CASES["llava-clip-llama"]
    model = case.model()
    call = MethodCall(Counts(answer=first), vlmprune.method("grid", keep_ratio=0.5).budget)
    refused(lambda: vlmprune.patch(model, call), "deep.counts returned (18, 18)", "its 1 cuts")


@pytest.mark.parametrize("debug", [1, "yes", None])
def test_debug_is_true_or_false(debug):
    with pytest.raises(vlmprune.MethodFieldError, match=r"debug=.*use True"):
        vlmprune.patch(zoo.CASES["llava-clip-llama"].model(), "grid", keep_ratio=0.5, debug=debug)


@dataclass(frozen=True, kw_only=True)
class Leaving(InDecoder):
    """Keeps the heads and neurons that it is told to."""

    name: ClassVar[str] = "leaving"
    answer: Any = None

    def needs(self, shape):
        return ()

    def cuts(self, shape):
        return (Cut(Place.DECODER, 1),)

    def select(self, tokens, keep):
        return GOOD

    def choose_heads(self, given, keep):
        return self.answer

    def core_neurons(self, activations, keep):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([0, 2], ("list [0, 2]", "int64")),
        (rows(0, 2).int(), ("int32", "int64")),
        (rows(0, 2, 3), ("must be (2,)",)),
        (rows(2, 0), ("2 before 0", "sort")),
        (rows(2, 2), ("2 twice", "once")),
        (rows(0, 4), ("with 4", "0 to 3")),
    ],
)
def test_neurons_that_stay(answer, words):
    mine, told = Leaving(answer=answer), ("leaving.core_neurons", "exactly 2 of the 4")
    refused(lambda: core_neurons(mine, torch.rand(5, 4), 2, debug=False), *told, *words)


def test_heads_that_stay():
    given = torch.rand(1, 3, 4)
    refused(
        lambda: heads(Leaving(answer=rows(0, 2)), given, 2, debug=False),
        "leaving.choose_heads",
        "heads must be (1, 2)",
    )
    refused(lambda: heads(Leaving(answer=rows(2, 0)[None]), given, 2, debug=False), "2 before 0")
    kept = rows(1, 3)[None]
    assert heads(Leaving(answer=kept), given, 2, debug=False) is kept
