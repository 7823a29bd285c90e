"""What of vLLM's settings cannot be combined with pruning, refused when the model is loaded."""

from __future__ import annotations

from typing import Any

from ...prune.contract import Features
from ...prune.errors import UnsupportedFeatureError
from .served import OF_ATTENTION, OF_PROMPT, Served


def check_engine(config: Any, served: Served, *, travels: bool = False) -> None:
    """Refuse a `VllmConfig` whose results could not be those of the shortened prompt.

    Args:
        travels: whether positions come with embeddings, which only the first processes see.

    Raises:
        UnsupportedFeatureError: with the flag to leave out.
    """
    if config.speculative_config is not None:
        _refuse("Speculative decoding", "--speculative-config", "its draft model was not tried")
    if getattr(config.lora_config, "enable_tower_connector_lora", False):
        _refuse(
            "LoRA of the encoder",
            "--enable-tower-connector-lora",
            "vLLM counts its patches by the tokens that enter the LLM",
        )
    if served.asks and config.lora_config is not None:
        _refuse(
            f"LoRA with {served.call.name}",
            "--enable-lora",
            "vLLM has not chosen an adapter where the question is embedded; divprune reads none",
        )
    if travels and config.parallel_config.pipeline_parallel_size > 1:
        _refuse(
            "Pipeline parallelism",
            "--pipeline-parallel-size",
            "only its first stage is told where kept tokens were in their image",
        )
    if config.model_config.multimodal_config.is_multimodal_pruning_enabled():
        _refuse("vLLM's own pruning of videos", "--video-pruning-rate", "both would cut the same")
    if getattr(config.compilation_config, "cudagraph_mm_encoder", False):
        _refuse(
            "CUDA graphs of the encoder",
            "cudagraph_mm_encoder",
            "they bypass the place where tokens are chosen",
        )
    _check_reading(config, served)


def _check_reading(config: Any, served: Served) -> None:
    """What would keep a method that reads more than features from reading it."""
    reads = [need for need in served.needs if not isinstance(need, (Features, *OF_PROMPT))]
    if reads and getattr(config.compilation_config, "compile_mm_encoder", False):
        _refuse(
            f"A compiled encoder with {served.call.name}",
            "compile_mm_encoder",
            f"nothing shows {reads[0]} in it; divprune reads features alone",
        )
    if config.parallel_config.tensor_parallel_size == 1:
        return
    attention = [need for need in reads if isinstance(need, tuple(OF_ATTENTION))]
    if attention:
        _refuse(
            f"Tensor parallelism with {served.call.name}",
            "--tensor-parallel-size",
            f"each process sees only its own heads of {attention[0]}; divprune reads no attention",
        )
    if reads and config.model_config.multimodal_config.mm_encoder_tp_mode == "data":
        _refuse(
            f"An encoder that shares images out among processes with {served.call.name}",
            "--mm-encoder-tp-mode data",
            f"each process sees only its own images' {reads[0]}; divprune reads features alone",
        )


def _refuse(what: str, flag: str, why: str) -> None:
    raise UnsupportedFeatureError(
        f"{what} cannot be combined with vlmprune, as {why}: drop {flag}."
    )
