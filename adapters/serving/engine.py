"""What of vLLM's settings cannot be combined with pruning, refused when the model is loaded."""

from __future__ import annotations

from typing import Any

from ...prune.errors import UnsupportedFeatureError
from .served import OF_ATTENTION, Served


def check_engine(config: Any, served: Served) -> None:
    """Refuse a `VllmConfig` whose results could not be those of the shortened prompt.

    Raises:
        UnsupportedFeatureError: with the flag to leave out.
    """
    if config.speculative_config is not None:
        _refuse("Speculative decoding", "--speculative-config", "its draft model was not tried")
    if getattr(config.compilation_config, "cudagraph_mm_encoder", False):
        _refuse(
            "CUDA graphs of the encoder",
            "cudagraph_mm_encoder",
            "they bypass the place where tokens are chosen",
        )
    reads = [need for need in served.needs if isinstance(need, tuple(OF_ATTENTION))]
    if reads and config.parallel_config.tensor_parallel_size > 1:
        _refuse(
            f"Tensor parallelism with {served.call.name}",
            "--tensor-parallel-size",
            f"each process sees only its own heads of {reads[0]}; divprune reads no attention",
        )


def _refuse(what: str, flag: str, why: str) -> None:
    raise UnsupportedFeatureError(
        f"{what} cannot be combined with vlmprune, as {why}: drop {flag}."
    )
