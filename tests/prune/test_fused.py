"""Greedy selections as Triton's kernels pick what torch picks."""

import os
import subprocess
import sys

import pytest
import torch
from kit import skips
from kit.paths import TESTS
from vlmprune.prune.ops.on_gpu import in_one_kernel

CASES = TESTS / "kit" / "fused_cases.py"


@skips.needs("triton")
def test_kernels_pick_what_torch_picks_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, CASES],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 50


@pytest.mark.cuda
@skips.needs("gpu")
def test_kernels_pick_what_torch_picks_on_a_gpu():
    from kit import fused_cases

    assert in_one_kernel(torch.zeros(3, 3, device="cuda"))
    assert fused_cases.compare("cuda") > 50


def test_torch_picks_elsewhere():
    """Without looking for Triton, which `test_nothing_of_transformers_is_loaded` sees."""
    assert not in_one_kernel(torch.zeros(3, 3))
