"""vLLM's server with the plugin counts what we count, and a killed one comes back as it was."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.request import Request, urlopen

import pytest
import vlmprune
from kit import skips, tiny_llava
from vlmprune.eval.bench.vllm_client import ask, body, picture_url
from vlmprune.eval.bench.vllm_server import VllmServer
from vlmprune.prune.errors import VlmpruneError

pytestmark = [skips.needs("vllm"), pytest.mark.slow]

TEXT, NEW, CLIENTS = 40, 8, 4
CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
FLAGS = ["--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"]
FLAGS += ["--kv-cache-memory-bytes", str(32 << 20), "--chat-template", CHAT]
BUDGETS = {9: None, 12: {"keep_tokens": 12}, 18: {"keep_ratio": 0.5}, 36: {"keep_ratio": 1}}


def answered(server, picture, budget=None):
    """(text, tokens of the prompt)"""
    asked = body(picture, NEW, budget) | {"stream": False}
    del asked["stream_options"]
    sent = json.dumps(asked).encode()
    at = f"{server.url}/v1/chat/completions"
    with urlopen(Request(at, sent, {"Content-Type": "application/json"})) as answer:
        found = json.load(answer)
    return found["choices"][0]["message"]["content"], found["usage"]["prompt_tokens"]


def test_a_server_counts_as_we_do_and_answers_the_same_after_it_was_killed_under_load(tmp_path):
    tiny_llava.save(tmp_path)
    args = vlmprune.vllm_args(str(tmp_path), "cdpruner", relevance="prompt", keep_ratio=0.25)
    options = {"overrides": args["hf_overrides"], "flags": FLAGS, "log": tmp_path / "log"}
    pictures = [picture_url(seed, (90, 160)) for seed in range(CLIENTS)]
    began, served = threading.Barrier(CLIENTS + 1, timeout=300), []

    def client(server, picture):
        served.append(ask(server.url, body(picture, NEW, None)))
        began.wait()
        while True:
            ask(server.url, body(picture, 64, None))

    def everything(server):
        found = [answered(server, None)]
        found += [answered(server, pictures[0], budget) for budget in BUDGETS.values()]
        return found + [answered(server, picture) for picture in pictures]

    with VllmServer(str(tmp_path), **options) as server:
        server.wait()
        before = everything(server)
        assert [count - TEXT for _, count in before] == [0, *BUDGETS, *[9] * CLIENTS]
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [pool.submit(client, server, picture) for picture in pictures]
            began.wait()
            server.kill()
        assert len(served) == CLIENTS and {type(one.exception()) for one in clients} == {
            VlmpruneError
        }
    with VllmServer(str(tmp_path), **options, port=server.port) as server:
        server.wait()
        assert everything(server) == before
