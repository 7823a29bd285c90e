"""What vLLM's entry point `vllm.general_plugins` calls in each of its processes."""

from __future__ import annotations

from ...prune.errors import VlmpruneError
from .arguments import ARCHITECTURES
from .versions import check_version


def register() -> None:
    """Make our architectures known; nothing changes for a model that does not ask for one.

    They are registered by name, so that an unsupported vLLM fails only where one is asked for.
    """
    from vllm import ModelRegistry

    for model_type, architecture in ARCHITECTURES.items():
        where = f"{__package__}.families.{model_type}"
        ModelRegistry.register_model(architecture, f"{where}:{architecture}")
    try:
        check_version()
    except VlmpruneError:
        return
    from .families.steps import settle

    for architecture in ARCHITECTURES.values():
        settle(architecture, architecture.removeprefix("VlmPrune"))
