"""Where modules compute, for models whose layers are spread over several devices or offloaded.

accelerate moves the inputs of a module inside its `forward`, after all hooks; and the weights of an
offloaded module are on the meta device until then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_META = torch.device("meta")


def execution_device(module: nn.Module) -> torch.device | None:
    """The device that a module's forward runs on; None for one without weights."""
    weight = _first_weight(module)
    if weight is None or weight.device != _META:
        return None if weight is None else weight.device
    for part in module.modules():
        for hook in offload_hooks(part):
            device = getattr(hook, "execution_device", None)
            if device is not None:
                return torch.device(device)
    return _META


def _first_weight(module: nn.Module) -> nn.Parameter | None:
    """The first of `module.parameters()`, which would take several times as long: decoding asks
    in every layer."""
    for weight in module._parameters.values():
        if weight is not None:
            return weight
    for child in module._modules.values():
        if child is not None and (found := _first_weight(child)) is not None:
            return found
    return None


def input_device(model: Any) -> torch.device:
    """Where a model wants its inputs: with its input embeddings."""
    device = execution_device(model.get_input_embeddings())
    return model.device if device is None else device


def offload_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks on one module, in order."""
    hook = getattr(module, "_hf_hook", None)
    return list(getattr(hook, "hooks", [hook])) if hook is not None else []
