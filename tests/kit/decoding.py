"""Answers with the logits of every step, and methods with fields that suit short prompts."""

from __future__ import annotations

from dataclasses import replace

import torch
import vlmprune
from kit.reported import Noted
from vlmprune.prune.budget import MethodCall

STEPS = 6
SMALL = {"elastic_cache": {"distance": -5}, "token_select": {"n_init": 2, "n_local": 3}}
"""Fields with which methods act on prompts as short as these."""
DETAILS = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def call_of(name: str, **budget: float) -> MethodCall:
    """A method by its name here, with fields that suit short prompts."""
    name, _, press = name.partition(":")
    fields = SMALL.get(name, {}) | ({"press": press} if press else {})
    call = vlmprune.method(name, **fields, **budget)
    return replace(call, method=Noted(**fields)) if name == "token_select" else call


def generated(model, inputs: dict, steps: int = STEPS, **options):
    return model.generate(**inputs, max_new_tokens=steps, **{**DETAILS, **options})


def logits_of(out) -> torch.Tensor:
    """(steps, B, V)"""
    return torch.stack(out.logits)
