"""A model of vLLM under load: one server as vLLM has it and one for each method, side by side.

The budget is the request's, so that one server measures all budgets of its method. Only one server
has work at a time; every request shows a picture that no server has seen, as users do, so that no
cache answers for the encoder or the prefill. Prompts of all clients are batched, as vLLM does.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from ...adapters.serving.arguments import vllm_args
from ...prune.errors import UnsupportedFeatureError
from ..models.loading import path_of
from ..models.shapes import TEXT_TOKENS, shape, usual_picture
from ..words.parts import Part, Parts
from .load import Load, Round, under_load
from .subject import Subject
from .vllm_client import ask, body, picture_url
from .vllm_model import write_model
from .vllm_server import VllmServer, ending_in_order, refuse_without_vllm

_ROOM = 1.25
"""Of what the requests that run at once need of the cache on a CPU: blocks are filled in part."""


@contextmanager
def of_vllm(
    subject: Subject,
    device: str,
    cells: Sequence[Parts],
    new_tokens: int,
    *,
    most_clients: int,
    engine_args: str,
) -> Iterator[Round]:
    """The subject as vLLM serves it in this environment.

    Args:
        most_clients: that ask at once.
        engine_args: further flags of `vllm serve`, as typed.

    Raises:
        UnsupportedFeatureError, MissingSignalError, BudgetError, UnsupportedModelError: what
            `vlmprune.vllm_args` refuses, before anything is started.
        ModelLoadError: a server does not start.
    """
    refuse_without_vllm()
    config: Any = subject.config()
    picture = subject.picture or (
        shape(subject.shape).picture if subject.shape else usual_picture(config)
    )
    with (
        ending_in_order(),
        TemporaryDirectory(prefix="vlmprune-") as scratch,
        ExitStack() as stack,
    ):
        folder = Path(scratch)
        model = folder / "model"
        if subject.model_name is None:
            write_model(config, model)
        name = str(model if subject.model_name is None else path_of(subject.model_name))
        overrides = _overrides(name, cells)
        flags = _flags(subject, config, device, new_tokens, most_clients, len(overrides))
        if subject.model_name is None:
            flags += ["--load-format", "dummy"]
        servers = {
            word: stack.enter_context(
                VllmServer(
                    name,
                    overrides=given,
                    flags=[*flags, *shlex.split(engine_args)],
                    log=folder / f"{number}.log",
                )
            )
            for number, (word, given) in enumerate(overrides.items())
        }
        for server in servers.values():
            server.wait()
        seeds = count()

        def round_of(parts: Parts, clients: int, requests: int) -> Load:
            url = servers[_word(parts)].url
            bodies = [
                body(picture_url(next(seeds), picture), new_tokens, _budget(parts))
                for _ in range(clients * requests)
            ]
            return under_load(lambda n: ask(url, bodies[n]), clients=clients, requests=requests)

        yield round_of


def _overrides(name: str, cells: Sequence[Parts]) -> dict[str, Mapping[str, object] | None]:
    """What each server is given: none for vLLM's own model, then one for each method, with the
    first of its budgets."""
    found: dict[str, Mapping[str, object] | None] = {}
    for parts in cells:
        given: Any = None
        if parts:
            part = _only(parts)
            budget = _budget(parts) or {}
            args = vllm_args(name, part.method.name, **part.method.fields(), **budget)
            given = args["hf_overrides"]
        found.setdefault(_word(parts), given)
    return found


def _only(parts: Parts) -> Part:
    if len(parts) > 1:
        raise UnsupportedFeatureError(
            f"{'+'.join(part.method.name for part in parts)}: vLLM runs one method, before the "
            f"LLM: give one a word, e.g. divprune."
        )
    return parts[0]


def _word(parts: Parts) -> str:
    """The same for all budgets of a method with its fields."""
    return repr(_only(parts).method) if parts else ""


def _budget(parts: Parts) -> dict[str, float] | None:
    budget = parts[0].budget if parts else None
    return None if budget is None else {budget.word: budget.value}


def _flags(
    subject: Subject, config: Any, device: str, new_tokens: int, clients: int, servers: int
) -> list[str]:
    """Of the server: lengths as long as they need be, and memory that leaves room for the others.

    On a CPU also: no compilation, and a cache just for the requests that run at once.
    """
    longest = int(subject.as_json()["visual_tokens"]) + TEXT_TOKENS + new_tokens + 64
    flags = ["--dtype", subject.dtype, "--max-model-len", str(longest)]
    flags += ["--max-num-seqs", str(clients), "--limit-mm-per-prompt", '{"image": 1}']
    flags += ["--gpu-memory-utilization", f"{0.9 / servers:.2f}"]
    if torch.device(device).type != "cpu":
        return flags
    text = config.get_text_config()
    heads = text.num_key_value_heads or text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    entry = 2 * text.num_hidden_layers * heads * head * getattr(torch, subject.dtype).itemsize
    cache = int(entry * longest * clients * _ROOM)
    return [*flags, "--enforce-eager", "--kv-cache-memory-bytes", str(cache)]
