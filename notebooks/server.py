"""A small server on one patched model: every request has its own budget, all share the weights.

    python notebooks/server.py --port 8000
    curl localhost:8000/ask -d '{"image": "cat.jpg", "question": "What is it?", "keep_tokens": 64}'

`image` is a path on the server (which listens to this machine alone) or base64 of a picture's file;
the budget is any word of `patch`, and without one the patch's own holds. A body above 32 MB and a
prompt longer than the model's positions are refused. See serving.md.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import io
import json
import time
from contextlib import nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
import vlmprune
from PIL import Image
from vlmprune.eval.models.loading import load
from vlmprune.eval.tasks.questions import chat_prompt
from vlmprune.prune.budget import BUDGET_WORDS

LARGEST_BODY = 32 * 2**20  # bytes


class Model:
    """A model, its processor and the patch, for any number of threads."""

    def __init__(self, name: str, method: str, keep_ratio: float) -> None:
        self.model, self.processor = load(name)
        self.handle = vlmprune.patch(self.model, method, keep_ratio=keep_ratio)
        self.room: int = self.model.config.get_text_config().max_position_embeddings

    def ask(
        self, image: object, question: object, max_new_tokens: object = 32, **budget: float
    ) -> dict:
        """The answer, and what it cost."""
        if not isinstance(image, str):
            raise ValueError(f"image={image!r}: give base64 of a picture, or a path.")
        if not isinstance(question, str):
            raise ValueError(f"question={question!r}: give a text.")
        if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}: give a whole number, at least 1.")
        text = chat_prompt(self.processor, question)
        inputs = self.processor(text=[text], images=[picture(image)], return_tensors="pt")
        length, room = inputs["input_ids"].shape[1], self.room
        if length + max_new_tokens > room:
            raise ValueError(
                f"{length} tokens of prompt and max_new_tokens={max_new_tokens} are more than the "
                f"model's {room}: ask a shorter question, or for fewer tokens."
            )
        started = time.perf_counter()
        with self.handle.budget(**budget) if budget else nullcontext():
            out = self.model.generate(
                **inputs.to(self.model.device, self.model.dtype),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )
        new = out.sequences[0, length:]
        return {
            "answer": self.processor.decode(new, skip_special_tokens=True).strip(),
            "tokens_in": sum(out.vlmprune_last.tokens_in),
            "tokens_kept": sum(out.vlmprune_last.tokens_kept),
            "seconds": round(time.perf_counter() - started, 3),
        }


def picture(image: str) -> Image.Image:
    """A picture from base64 of its file, or from a path."""
    try:
        return Image.open(io.BytesIO(base64.b64decode(image, validate=True))).convert("RGB")
    except (binascii.Error, OSError):
        return Image.open(image).convert("RGB")


def serve(model: Model, port: int) -> ThreadingHTTPServer:
    """A server that answers POST /ask, one thread a request; run its `serve_forever`."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.path != "/ask":
                return self.reply(404, {"error": "POST /ask"})
            try:
                size = int(self.headers.get("Content-Length", 0))
                if size > LARGEST_BODY:
                    return self.reply(413, {"error": f"at most {LARGEST_BODY} bytes, not {size}"})
                asked = json.loads(self.rfile.read(size))
                needed, known = {"image", "question"}, {"max_new_tokens", *BUDGET_WORDS}
                if not isinstance(asked, dict) or not needed <= set(asked) <= needed | known:
                    given = sorted(asked) if isinstance(asked, dict) else type(asked).__name__
                    raise ValueError(
                        f"{given}: give an object with image and question, and of {sorted(known)} "
                        f"what you like."
                    )
                return self.reply(200, model.ask(**asked))
            except (ValueError, TypeError, OSError, vlmprune.VlmpruneError) as error:
                return self.reply(400, {"error": str(error)})
            except Exception as error:  # no memory, a bug: said to the client too
                self.reply(500, {"error": str(error)})
                raise

        def reply(self, code: int, answer: dict) -> None:
            body = json.dumps(answer).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--method", default="divprune")
    parser.add_argument("--keep_ratio", type=float, default=0.25)
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    server = serve(Model(args.model, args.method, args.keep_ratio), args.port)
    print(f"http://127.0.0.1:{server.server_port}/ask", flush=True)
    with suppress(KeyboardInterrupt):
        server.serve_forever()


if __name__ == "__main__":
    main()
