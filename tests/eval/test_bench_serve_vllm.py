"""The bench of a server: what it asks, how it times a stream, what it refuses. vLLM is imitated."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from kit import skips
from kit.forked import exit_code, forked
from transformers import AutoConfig, AutoProcessor
from vlmprune.eval import cli
from vlmprune.eval.bench import vllm_load, vllm_model
from vlmprune.eval.bench.subject import Subject
from vlmprune.eval.bench.vllm_client import ask, body, picture_url
from vlmprune.eval.bench.vllm_server import VllmServer, ending_in_order
from vlmprune.eval.models.loading import ModelLoadError
from vlmprune.prune.errors import VlmpruneError

SMALL = Subject(layers=2, width=64, visual_tokens=16)
TEXT, NEW = 40, 3


class Answering(BaseHTTPRequestHandler):
    """As vLLM streams: a role, tokens one by one, the counts."""

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        if "temperature" not in asked:
            return self.send_error(400, "no temperature")
        budget = asked.get("mm_processor_kwargs", {}).get("vlmprune", {"keep_ratio": 1})
        prompt = TEXT + round(16 * budget["keep_ratio"])
        self.send_response(200)
        self.end_headers()
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for number in range(asked["max_tokens"]):
            time.sleep(0.01)
            self._event({"choices": [{"delta": {"content": f"w{number}"}}]})
        if not self.server.breaks:
            usage = {"prompt_tokens": prompt, "completion_tokens": asked["max_tokens"]}
            self._event({"choices": [], "usage": usage})
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, event):
        self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    found = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    found.asked, found.breaks = [], False
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def url(server):
    return f"http://127.0.0.1:{server.server_port}"


def test_a_stream_is_timed_from_its_first_word(server):
    found = ask(url(server), body(picture_url(0, (8, 12)), NEW, {"keep_ratio": 0.25}))
    assert 0.01 <= found.first_token < found.answered and found.per_token >= 0.01
    assert (found.prompt_tokens, found.new_tokens) == (TEXT + 4, NEW)
    assert picture_url(0, (8, 12)) == picture_url(0, (8, 12)) != picture_url(1, (8, 12))


def test_what_a_server_refuses_or_leaves_open_is_raised(server):
    with pytest.raises(VlmpruneError, match=r"refuses a request \(400\)"):
        ask(url(server), {"messages": []})
    server.breaks = True
    with pytest.raises(VlmpruneError, match="before its answer was whole"):
        ask(url(server), body(None, NEW, None))
    with pytest.raises(VlmpruneError, match="breaks off"):
        ask("http://127.0.0.1:9", body(None, NEW, None))


def test_a_server_that_stops_says_why(tmp_path):
    log = tmp_path / "log"
    flags = ["--dtype", "float32"]
    server = VllmServer("nowhere", overrides=None, flags=flags, log=log)
    server._command = [sys.executable, "-c", "raise ValueError('no such model')"]
    with pytest.raises(ModelLoadError, match="ValueError: no such model"), server:
        server.wait()


def test_a_bench_that_is_told_to_end_takes_its_servers_along(tmp_path):
    server = VllmServer("nowhere", overrides=None, flags=[], log=tmp_path / "log")
    server._command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(SystemExit), ending_in_order(), server:
        process = server._process
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)  # not to its end
    assert process.poll() is not None


@skips.needs("fork")
def test_a_bench_that_is_killed_takes_all_processes_of_its_servers_along(tmp_path):
    """Each of them holds the pipe open; its other end says when none is left."""
    os.mkfifo(pipe := tmp_path / "pipe")

    def bench():
        server = VllmServer("nowhere", overrides=None, flags=[], log=tmp_path / "log")
        server._command = ["sh", "-c", f"exec 3>{pipe}; sleep 600 & sleep 600"]
        with server:
            time.sleep(600)

    child = forked(bench)
    with pipe.open("rb") as held:  # once the server is there
        assert not select.select([held], [], [], 0)[0]
        os.kill(child, signal.SIGKILL)
        assert exit_code(child) == -signal.SIGKILL
        assert select.select([held], [], [], 30)[0] and held.read() == b""


def test_a_model_of_random_weights_is_written_for_vllm(tmp_path):
    vllm_model.write_model(SMALL.config(), tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    asked = body("", NEW, None)["messages"]
    asked[0]["content"][0] = {"type": "image"}
    ids = processor.tokenizer.apply_chat_template(asked)["input_ids"]
    assert len(ids) == TEXT + 1 and ids[0] == config.image_token_id
    assert config.architectures == ["LlavaForConditionalGeneration"]


def test_the_command_asks_a_server_for_each_method(server, tmp_path, capsys, monkeypatch):
    started = []

    class Started(VllmServer):
        def __init__(self, model, **given):
            super().__init__(model, **given, port=server.server_port)
            started.append(given["overrides"])

        def __enter__(self):
            return self

        def wait(self):
            pass

    monkeypatch.setattr(vllm_load, "VllmServer", Started)
    monkeypatch.setattr(vllm_load, "refuse_without_vllm", lambda: None)
    file = tmp_path / "serve.json"
    sizes = ["--layers", "2", "--width", "64", "--tokens", "16", "--new_tokens", str(NEW)]
    argv = [*sizes, "--budgets", "0.5,0.25", "--concurrency", "2", "--repeats", "1"]
    assert cli.main(["bench", "serve", "--engine", "vllm", *argv, "-o", str(file)]) == 0
    assert [given and given["vlmprune"]["method"] for given in started] == [
        None,
        "divprune",
        "vtc_cls",
    ]
    rows = [(row["name"], row["prompt_tokens"]) for row in json.loads(file.read_text())["rows"]]
    assert rows[:3] == [
        ("dense", TEXT + 16),
        ("divprune(keep_ratio=0.5)", TEXT + 8),
        ("divprune(keep_ratio=0.25)", TEXT + 4),
    ]
    pictures = [asked["messages"][0]["content"][0]["image_url"]["url"] for asked in server.asked]
    assert len(set(pictures)) == len(pictures) == 5 + 5 * 2 * 2  # warm-up, then 2 clients twice
    assert "vLLM batches prompts" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, match",
    [
        (["--engine", "vllm", "--methods", "fastv"], "vLLM cannot run"),
        (["--engine", "vllm", "--methods", "divprune+fastv"], "vLLM runs one method"),
        (["--engine", "vllm", "--shape", "qwen2.5-vl-small"], "is not made here"),
        (["--engine_args=--enforce-eager"], "add --engine vllm"),
    ],
)
def test_what_cannot_be_measured_is_refused(argv, match, capsys, monkeypatch):
    monkeypatch.setattr(vllm_load, "refuse_without_vllm", lambda: None)
    assert cli.main(["bench", "serve", *argv]) == 2
    assert match in " ".join(capsys.readouterr().err.split())
