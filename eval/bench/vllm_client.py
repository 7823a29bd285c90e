"""One question about a picture, asked of an OpenAI-compatible server, its answer timed as it comes.

Nothing but the standard library, so that it asks any server from any environment.
"""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection, HTTPException
from json import JSONDecodeError
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL import Image

from ...prune.errors import VlmpruneError
from .load import Asked
from .vllm_server import NAME

_TEXT = (
    "Please look at this picture with care and say what is in it , where each thing lies , which "
    "colour it has , how many there are of each kind , and what you think will happen next ."
)
"""Forty words, as many tokens as other benches put around a picture."""


def body(
    picture: str | None, new_tokens: int, budget: Mapping[str, float] | None
) -> dict[str, object]:
    """What is sent.

    Args:
        picture: of `picture_url`; None: the text alone.
        new_tokens: of the answer, no more and no less.
        budget: of this request; None: it does not speak of one.
    """
    content: list[dict[str, object]] = [{"type": "text", "text": _TEXT}]
    if picture is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture}})
    asked: dict[str, object] = {
        "model": NAME,
        "messages": [{"role": "user", "content": content}],
        "temperature": 0,
        "max_tokens": new_tokens,
        "ignore_eos": True,
        "skip_special_tokens": False,  # every token is seen to come
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if budget is not None:
        asked["mm_processor_kwargs"] = {"vlmprune": dict(budget)}
    return asked


def picture_url(seed: int, picture: tuple[int, int]) -> str:
    """A picture (height, width in pixels) in its request; another one for each seed, so that no
    cache of the server knows it."""
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (12, 12, 3), generator=draw, dtype=torch.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse.numpy()).resize(picture[::-1]).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(url: str, asked: Mapping[str, object]) -> Asked:
    """Ask and read the answer to its end.

    Raises:
        VlmpruneError: the server refuses, is not there or breaks off.
    """
    where = urlsplit(url)
    connection = HTTPConnection(where.hostname or "", where.port)
    sent = json.dumps(asked).encode()
    started = time.perf_counter()
    try:
        connection.request(
            "POST", "/v1/chat/completions", sent, {"Content-Type": "application/json"}
        )
        answer = connection.getresponse()
        if answer.status != 200:
            said = answer.read().decode(errors="replace")
            raise VlmpruneError(f"The server refuses a request ({answer.status}): {said[:500]}")
        return _timed(answer, started)
    except (OSError, HTTPException, JSONDecodeError) as error:
        raise VlmpruneError(f"The server at {url} breaks off: {error!r}") from error
    finally:
        connection.close()


def _timed(answer: Any, started: float) -> Asked:
    first = ended = None
    usage: Mapping[str, int] = {}
    for event in _events(answer):
        now = time.perf_counter()
        if "error" in event:
            raise VlmpruneError(f"The server fails: {event['error']}")
        if any(choice.get("delta", {}).get("content") for choice in event["choices"]):
            first = now if first is None else first
            ended = now
        usage = event.get("usage") or usage
    if first is None or ended is None or not usage:
        raise VlmpruneError("The server broke off before its answer was whole.")
    return Asked(
        first - started, ended - started, usage["completion_tokens"], usage["prompt_tokens"]
    )


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    """Of a stream of server-sent events, up to its end."""
    for line in answer:
        data = line.decode().strip().removeprefix("data:").strip()
        if data and data != "[DONE]":
            yield json.loads(data)
