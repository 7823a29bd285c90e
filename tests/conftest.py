"""Settings for all tests: few threads, repeatable property tests, little search for garbage."""

import gc
import os
import sys

# Threads of this process and of the commands that tests start: one each, and no busy waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
from hypothesis import HealthCheck, settings

# What pytest makes of the tests' files is kept for the next run, whatever an image of a container
# says for the sake of its size: to make it takes each worker three seconds.
sys.dont_write_bytecode = False

pytest.register_assert_rewrite("kit")  # a helper's failed assertion shows its values too

settings.register_profile(
    "vlmprune",
    max_examples=40,
    deadline=None,  # no test depends on time
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("vlmprune")

gc.disable()  # until all tests are known, nothing that is made is garbage


def pytest_collection_modifyitems(items):
    """Slow tests first, so that no worker begins one when the others are done."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch  # not above, as the process that hands out the tests does without it

    torch.set_num_threads(1)


@pytest.fixture(scope="module", autouse=True)
def cheap_collection():
    """What is there before a file of tests (modules, shared models) is not looked through at every
    collection of garbage in it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def timed_once(monkeypatch):
    """Cells of sweeps and comparisons are timed on one input, in tests that say nothing of times:
    that is most of what a cell of a few questions takes."""
    from vlmprune.eval.lmms import benchmark
    from vlmprune.eval.measure import evaluate
    from vlmprune.eval.measure.times import measure

    def once(model, inputs, *, beside=None, **given):
        few = beside[:1] if beside else None
        return measure(model, inputs[:1], beside=few, new_tokens=2, **given)

    monkeypatch.setattr(evaluate, "measure", once)
    monkeypatch.setattr(benchmark, "measure", once)
