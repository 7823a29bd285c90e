"""Records as a sweep writes them, for what is made of result files."""

from __future__ import annotations

from vlmprune.eval.results.statistics import mean_score

TIMES = dict.fromkeys(
    (
        "first_token",
        "vision",
        "select",
        "prefill",
        "per_decoded_token",
        "dense_first_token",
        "share_of_dense",
    )
)


def record(number, methods=(), *, text="plain", share=1.0, outcomes=(1, 1, 0, 1), **changed):
    config = {
        "model": text,
        "fingerprint": "f",
        "methods": list(methods),
        "positions": None,
        "task": text,
        "task_version": "1",
        "limit": 4,
        "seed": 0,
        "max_new_tokens": 8,
        "dtype": "float32",
        "attn_implementation": "sdpa",
    }
    spread = {"median": 0.02, "q1": 0.01, "q3": 0.03, "n": 3}
    example = {"id": "0", "question": text, "answer": text, "prediction": text, "score": 1.0}
    return {
        "schema": 3,
        "id": f"{number:016x}",
        "status": "ok",
        "config": config,
        "finished": "2026-01-02T03:04:05+00:00",
        "seconds": 2.0,
        "batch_size": 4,
        "load_average": None,
        "versions": {"vlmprune": "0"},
        "hardware": {"device": "cpu", "cpu": text, "cpu_cores": 1, "torch_threads": 1},
        "scores": {"accuracy": mean_score(outcomes)},
        "tokens": {
            "in_per_image": 9.0,
            "kept_per_image": 9 * share,
            "average_per_layer": 9 * share,
            "per_layer": [9 * share],
            "text": 3.0,
            "generated": 1.0,
        },
        "flops": {"prefill": 1e9, "visual_share": share},
        "times": TIMES | {"first_token": spread},
        "kv_bytes": 1024.0,
        "peak_memory_bytes": None,
        "positions": None,
        "notes": [],
        "examples": [example | {"picture": "pictures/0.png"}],
    } | changed


def fastv(ratio=0.5):
    budget = {"word": "keep_ratio", "value": ratio}
    return [{"name": "fastv", "fields": {"layer": 3}, "budget": budget}]
