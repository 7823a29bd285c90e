"""The server example: requests with budgets of their own, at the same time."""

from __future__ import annotations

import base64
import http.client
import importlib.util
import io
import json
import threading
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import vlmprune
from PIL import Image
from vlmprune.eval.embedded.task import EmbeddedTask

FILE = Path(__file__).parent.parent / "notebooks" / "server.py"


@pytest.fixture(scope="module")
def port():
    spec = importlib.util.spec_from_file_location("server_example", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    server = module.serve(module.Model("embedded", "divprune", 0.25), 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def ask(port: int, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/ask", data=json.dumps(body).encode(), method="POST"
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def encoded(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def test_eight_requests_at_once_are_answered_as_one_after_the_other(port):
    questions = EmbeddedTask().questions(8)
    budgets = [{"keep_tokens": n} for n in (9, 20, 49, 196)] + [{"keep_ratio": 0.1}, {}, {}, {}]
    bodies = [
        {"image": encoded(q.image), "question": q.question, **budget}
        for q, budget in zip(questions, budgets, strict=True)
    ]
    serial = [ask(port, body) for body in bodies]
    assert [one["tokens_kept"] for one in serial] == [9, 20, 49, 196, 20, 49, 49, 49]
    with ThreadPoolExecutor(8) as pool:
        threaded = list(pool.map(lambda body: ask(port, body), bodies))
    for one, other in zip(serial, threaded, strict=True):
        assert one.pop("seconds") > 0 and other.pop("seconds") > 0
        assert one == other and one["answer"] and one["tokens_in"] == 196


def test_a_path_and_mistakes(port, tmp_path):
    (question,) = EmbeddedTask().questions(1)
    question.image.save(tmp_path / "one.png")
    body = {"image": str(tmp_path / "one.png"), "question": question.question}
    assert ask(port, body)["tokens_kept"] == 49
    for wrong, said in (
        ({"keep_tokens": 0}, "keep_tokens=0"),
        ({"keep_token": 9}, "keep_tokens"),
        ({"image": "nowhere.png"}, "nowhere.png"),
        ({"question": 5}, "question=5"),
        ({"max_new_tokens": "a"}, "max_new_tokens='a'"),
        ({"image": None}, "image=None"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(port, {**body, **wrong})
        assert refused.value.code == 400 and said in json.load(refused.value)["error"]
    for no_request in (None, "abc", [body], {"image": body["image"]}):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(port, no_request)
        assert refused.value.code == 400 and "question" in json.load(refused.value)["error"]


def test_what_would_fill_the_memory_is_refused_and_what_breaks_is_said(port, monkeypatch):
    (question,) = EmbeddedTask().questions(1)
    body = {"image": encoded(question.image), "question": question.question}
    for wrong, said in (({"question": "what " * 600}, "512"), ({"max_new_tokens": 600}, "512")):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(port, {**body, **wrong})
        assert refused.value.code == 400 and said in json.load(refused.value)["error"]
    client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    client.putrequest("POST", "/ask")
    client.putheader("Content-Length", str(10**10))
    client.endheaders()
    assert client.getresponse().status == 413

    def broken(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(vlmprune.Handle, "budget", broken)
        with pytest.raises(urllib.error.HTTPError) as failed:
            ask(port, {**body, "keep_tokens": 9})
    assert failed.value.code == 500 and json.load(failed.value)["error"] == "out of memory"
    assert ask(port, body)["tokens_kept"] == 49
