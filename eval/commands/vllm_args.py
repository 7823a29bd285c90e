"""`vlmprune vllm-args`: what `vllm serve MODEL --hf-overrides` needs to prune, as JSON."""

from __future__ import annotations

import json

from ...adapters.serving.arguments import vllm_args
from ..arguments.vllm_args import VllmArgsRequest
from ..console import stdout
from ..words.typed import parse_fields


def run(request: VllmArgsRequest) -> int:
    """The command. Returns the exit code."""
    fields = parse_fields(request.method_args)
    found = vllm_args(request.model, request.method, **fields, **request.budget)
    text = json.dumps(found["hf_overrides"])
    stdout().print(text, markup=False, highlight=False, soft_wrap=True)
    return 0
