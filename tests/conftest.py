"""Settings for all tests: few threads, repeatable property tests."""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)
settings.register_profile(
    "vlmprune",
    max_examples=40,
    deadline=None,  # no test depends on time
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("vlmprune")
