"""Every method selects on tiny models what it selected when `data/selections.json` was written:
what a change of the inside must leave alone. Whether it is right, the oracle says."""

import copy

import pytest
import vlmprune
from kit import zoo
from kit.selections import MODELS, compact, differences, of_method, stored

STORED = stored()


def models_of(method: str) -> list[str]:
    """Three models, and of the others one by turns: all with `zoo.EVERY_CELL`."""
    others = [name for name in MODELS if name not in zoo.THREE_NAMES]
    if not zoo.EVERY_CELL:
        others = [others[vlmprune.methods().index(method) % len(others)]]
    return [name for name in MODELS if name in (*zoo.THREE_NAMES, *others)]


@pytest.mark.parametrize("method", vlmprune.methods())
def test_selections_are_as_they_were(method):
    models = models_of(method)
    then = {k: v for k, v in STORED.get(method, {}).items() if k.split(", ")[0] in models}
    lines = list(differences(then, of_method(method, models)))
    assert not lines, "\n".join([*lines, "Meant? python tests/kit/selections.py --write"])


def test_the_store_names_no_method_that_is_gone():
    assert list(STORED) == vlmprune.methods()


def test_a_difference_is_found_and_named():
    now = copy.deepcopy(STORED["divprune"])
    cell = "qwen2_5_vl, one image, keep_tokens=9"
    assert not list(differences(STORED["divprune"], now))
    now[cell]["kept"] = ["0-8"]
    (line,) = differences(STORED["divprune"], now)
    assert line.startswith(f"{cell}: kept: was [") and line.endswith("is ['0-8']")
    del now[cell]
    (line,) = differences(STORED["divprune"], now)
    assert line.startswith(f"{cell}: was {{") and line.endswith("is None")


def test_runs_are_written_short_and_tell_lists_apart():
    assert compact([0, 1, 2, 5, 7, 7, -1, -1]) == "0-2 5 7 7 x x"
    assert compact([[3, 4], None, []]) == ["3-4", None, ""]
