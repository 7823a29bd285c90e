"""Models spread over memory, disk and devices, and methods of every kind to run on them."""

from __future__ import annotations

import re

import torch
import vlmprune
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from kit import zoo
from kit.snapshots import differences
from torch import nn

STEPS = 3
ROWS = (zoo.TWO, zoo.ONE)
METHODS = {
    "in the encoder": [vlmprune.method("tome", keep_ratio=0.4)],
    "fusing": [vlmprune.method("evit", keep_ratio=0.4)],
    "features": [vlmprune.method("divprune", keep_ratio=0.4)],
    "tower": [vlmprune.method("hiprune", keep_ratio=0.4)],
    "merging": [vlmprune.method("pool", keep_ratio=0.4)],
    "aggregates": [vlmprune.method("visionzip", keep_ratio=0.4, scores="received")],
    "words": [vlmprune.method("todre", keep_ratio=0.4, pivot="received")],
    "text rows": [vlmprune.method("fastv", keep_ratio=0.4, layer=2)],
    "next layer": [vlmprune.method("pyramiddrop", keep_ratio=0.4)],
    "neurons": [vlmprune.method("corematching", keep_ratio=0.4)],
    "recycling": [vlmprune.method("sparsevlm", keep_ratio=0.2)],
    "ranking": [vlmprune.method("sparsevlm_plus", keep_ratio=0.4)],
    "steps": [vlmprune.method("transprune", keep_ratio=0.4)],
    "evicting": [vlmprune.method("elastic_cache", keep_ratio=0.4)],
    "attending": [vlmprune.method("token_select", keep_ratio=0.4, n_init=1, n_local=2)],
    "everywhere": [
        vlmprune.method("divprune", keep_ratio=0.6),
        vlmprune.method("pyramiddrop", keep_ratio=0.4),
        vlmprune.method("visual_press", keep_ratio=0.3, press="received"),
    ],
}


def to_disk(model, folder):
    """Encoder, head and the middle of the decoder on disk; the rest in memory."""
    text = "model.language_model"
    device_map = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    device_map |= {f"model.{name}": "disk" for name, _ in model.model.named_children()}
    device_map.pop(text)
    device_map |= {f"{text}.{n}": "cpu" for n, _ in model.model.language_model.named_children()}
    device_map.pop(f"{text}.layers")
    layers = len(model.model.language_model.layers)
    device_map |= {f"{text}.layers.{i}": "disk" if i % 2 else "cpu" for i in range(layers)}
    device_map |= {f"model.{n}": "cpu" for n, _ in model.model.named_parameters(recurse=False)}
    device_map["lm_head"] = "disk"
    return dispatch_model(model, device_map, offload_dir=str(folder), force_hooks=True)


def works_on(case: zoo.Case, calls) -> bool:
    resampled = any(name in case.layout.resampled for name in zoo.images(ROWS))
    refused = resampled and calls[0].name in zoo.IN_ENCODER
    return not refused and not any(zoo.lacks_signal(case, call) for call in calls)


def changed(before: dict, after: dict) -> list[str]:
    """Differences, but for parameters: accelerate exchanges them in every forward."""
    return [one for one in differences(before, after) if not one.endswith("._parameters")]


ONE, TWO = torch.device("xla:0"), torch.device("xla:1")


def spread(model, away: int) -> None:
    """Every second layer of encoder and decoder (the `away`th first), and the head, on another
    device."""
    for name, module in model.named_modules():
        layer = re.search(r"\.(\d+)(\.|$)", name)
        other = layer is not None and int(layer[1]) % 2 == away
        hook = AlignDevicesHook(TWO if other or name == "lm_head" else ONE, io_same_device=not name)
        above_layers = any(isinstance(part, nn.ModuleList) for part in module.modules())
        if name and above_layers:  # as accelerate does it: parameters are placed, inputs are not
            hook.init_hook(module)
        else:
            add_hook_to_module(module, hook)
