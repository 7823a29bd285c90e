"""Settings for all tests: few threads, repeatable property tests."""

import gc
import os

# Threads of this process and of the commands that tests start: one each, and no busy waiting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("kit")  # a helper's failed assertion shows its values too

torch.set_num_threads(1)
settings.register_profile(
    "vlmprune",
    max_examples=40,
    deadline=None,  # no test depends on time
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("vlmprune")


@pytest.fixture(scope="module", autouse=True)
def cheap_collection():
    """What is there before a file of tests (modules, shared models) is not looked through at every
    collection of garbage in it."""
    gc.collect()
    gc.freeze()
