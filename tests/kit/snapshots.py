"""What can be seen of a model before and after: attributes, hooks, tables, and what has changed."""

from __future__ import annotations

import gc

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vlmprune.adapters.handle import HANDLE

UPSTREAM_STATE = {"rope_deltas"}
"""Attributes that transformers itself writes on a module while it runs."""


def snapshot(model) -> dict:
    """Everything observable of a model and of the library's global tables."""
    names = ALL_ATTENTION_FUNCTIONS.keys()
    if HANDLE not in vars(model) and any("vlmprune" in name for name in names):
        gc.collect()  # models that other tests dropped while patched take their names along
    state = {}
    for name, module in model.named_modules():
        own = {k: id(v) for k, v in vars(module).items() if k not in UPSTREAM_STATE}
        tables = {
            k: [(key, id(value)) for key, value in v.items()]
            for k, v in vars(module).items()
            if isinstance(v, dict)
        }
        state[name] = (id(module), type(module), own, tables)
    attention = sorted(ALL_ATTENTION_FUNCTIONS.keys()), sorted(ALL_MASK_ATTENTION_FUNCTIONS.keys())
    written = {"use_diff": False}  # four times as fast
    configs = (getattr(model, name, None) for name in ("config", "generation_config"))
    config = [c.to_json_string(**written) for c in configs if hasattr(c, "to_json_string")]
    return {
        "modules": state,
        "keys": list(model.state_dict()),
        "global": attention,
        "config": config,
        "attention": [
            m.config._attn_implementation for m in model.modules() if hasattr(m, "config")
        ],
    }


def differences(before: dict, after: dict) -> list[str]:
    found = [
        f"{k}: {before[k]} -> {after[k]}"
        for k in before
        if k != "modules" and before[k] != after[k]
    ]
    for name in before["modules"].keys() | after["modules"].keys():
        one, two = before["modules"].get(name), after["modules"].get(name)
        if one is None or two is None or one[:2] != two[:2]:
            found.append(f"module {name!r} is another one")
            continue
        for kind, a, b in (("attribute", one[2], two[2]), ("entries of", one[3], two[3])):
            found += [f"{kind} {name}.{k}" for k in a.keys() | b.keys() if a.get(k) != b.get(k)]
    return sorted(found)
