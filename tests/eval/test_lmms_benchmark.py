"""Tasks of lmms-eval in a sweep: equal to the native benchmark, any task, several processes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kit import skips

pytest.importorskip("lmms_eval", reason=skips.why("lmms"))

import vlmprune
from kit import lmms as lmms_kit
from kit import zoo
from kit.torchrun import torchrun
from lmms_eval.api.task import ConfigurableTask
from PIL import Image
from vlmprune.eval import embedded
from vlmprune.eval.embedded.task import EmbeddedTask
from vlmprune.eval.lmms.benchmark import LmmsBenchmark, MissingLmmsError, benchmarks
from vlmprune.eval.lmms.version import version_of
from vlmprune.eval.measure.evaluate import Benchmark, Evaluator
from vlmprune.eval.results.statistics import RESAMPLES, difference
from vlmprune.eval.results.store import read_records
from vlmprune.eval.tasks.protocols import TaskError

DIVPRUNE = (vlmprune.method("divprune", keep_ratio=0.1),)
LIMIT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lmms")


def tiny(name: str, task: str, folder: Path, **options) -> LmmsBenchmark:
    model, processor = zoo.CASES[name].model(), lmms_kit.PROCESSORS[name]()
    options |= {"include_path": str(lmms_kit.tasks(folder)), "pixels": lmms_kit.pixels(name)}
    (found,) = benchmarks([task], model, processor, **options)
    return found


def pictures(found: dict[int, Image.Image]):
    def save(picture: Image.Image, number: int) -> str:
        found[number] = picture
        return f"{number}.jpg"

    return save


def test_the_embedded_benchmark_gives_what_the_native_one_gives():
    model, processor = embedded.load_model()
    (theirs,) = benchmarks([embedded.TASK], model, processor, limit=LIMIT, batch_size=8)
    task = EmbeddedTask()
    ours: Benchmark = Evaluator(model, processor, task, task.questions(LIMIT), batch_size=8)
    benchmark: Benchmark = theirs
    assert (benchmark.name, benchmark.count) == (embedded.TASK, LIMIT)
    assert benchmark.max_new_tokens == ours.max_new_tokens
    for calls in ((), DIVPRUNE):
        drawn: list[dict[int, Image.Image]] = [{}, {}]
        told: list[int] = []
        a, said = benchmark.run(calls, save_picture=pictures(drawn[0]), progress=told.append)
        b, expected = ours.run(calls, save_picture=pictures(drawn[1]))
        assert list(a["scores"]) == ["exact_match"]
        score, native = a["scores"]["exact_match"], b["scores"]["accuracy"]
        assert score | {"by_kind": {}} == native | {"by_kind": {}}
        for key in ("tokens", "flops", "kv_bytes", "positions", "notes"):
            assert a[key] == b[key], key
        assert sum(told) == LIMIT
        assert [(s.question, s.answer, s.prediction, s.score, s.kept) for s in said] == [
            (s.question, s.answer, s.prediction, s.score, s.kept) for s in expected
        ]
        assert [e["picture"] for e in a["examples"]] == [f"{n}.jpg" for n in range(4)]
        for n in range(4):
            assert drawn[0][n].tobytes() == drawn[1][n].tobytes()
        assert a["times"]["first_token"]["n"] == 8
        assert a["times"]["share_of_dense"] is not None or not calls
    assert not hasattr(model, "_vlmprune_handle")


def test_points_that_are_no_mean_have_paired_resamples(folder):
    benchmark = tiny("llava-clip-llama", "tiny_pairs", folder, batch_size=3)
    (dense, _), (pruned, samples) = benchmark.run(), benchmark.run(DIVPRUNE)
    a, b = dense["scores"]["pairs"], pruned["scores"]["pairs"]
    assert a["unit"] == b["unit"] == "points" and a["n"] == lmms_kit.QUESTIONS
    assert not a["outcomes"] and len(a["replicates"]) == len(b["replicates"]) == RESAMPLES
    assert a["low"] <= a["value"] <= a["high"] and a["low"] < a["high"]
    again = benchmark.run()[0]["scores"]["pairs"]
    assert again == a
    assert difference(a, a) == (0.0, 0.0, 0.0)
    assert {sample.score for sample in samples} <= {0.0, 1.0}


def test_published_tasks(folder):
    """POPE and MME with their own prompts and metrics."""
    model, processor = embedded.load_model()
    path = str(lmms_kit.published(folder))
    pope, mme = benchmarks(["local_pope", "local_mme"], model, processor, include_path=path)
    (scores, samples) = pope.run(DIVPRUNE)
    names = ["accuracy", "precision", "recall", "f1_score", "yes_ratio"]
    assert list(scores["scores"]) == [f"pope_{name}" for name in names]
    accuracy = scores["scores"]["pope_accuracy"]
    assert accuracy["unit"] == "share" and len(accuracy["replicates"]) == RESAMPLES
    said = [s.prediction.lower() == s.answer.lower() for s in samples]
    assert [s.score for s in samples] == said
    assert accuracy["value"] == pytest.approx(sum(said) / len(said))
    assert samples[0].question.endswith("Answer the question using a single word or phrase.")
    (scores, samples) = mme.run()
    assert list(scores["scores"]) == ["mme_perception_score", "mme_cognition_score"]
    for score in scores["scores"].values():  # pairs of questions stay together when resampled
        assert score["n"] == 4 and len(score["replicates"]) == RESAMPLES


def test_videos_are_drawn(folder):
    for name in ("qwen2_5_vl", "qwen3_vl", "llava_onevision"):
        benchmark = tiny(name, "tiny_videos", folder, limit=1)
        for calls in ((), DIVPRUNE):
            drawn: dict[int, Image.Image] = {}
            measured, samples = benchmark.run(calls, save_picture=pictures(drawn))
            assert list(drawn) == [0]
            assert len(samples) == 1 and measured["tokens"]["in_per_image"] > 8
        assert measured["tokens"]["kept_per_image"] < measured["tokens"]["in_per_image"] / 5


def test_groups_are_their_tasks(folder):
    model, processor = zoo.CASES["llava_next"].model(), lmms_kit.PROCESSORS["llava_next"]()
    path = str(lmms_kit.tasks(folder))
    found = benchmarks(["tiny_group"], model, processor, include_path=path)
    assert sorted(b.name for b in found) == ["tiny_pairs", "tiny_pictures"]
    assert all(b.count == lmms_kit.QUESTIONS for b in found)


def test_versions_tell_tasks_apart_and_not_places(folder, tmp_path):
    one = tiny("llava-clip-llama", "tiny_pictures", folder)
    elsewhere = tiny("llava-clip-llama", "tiny_pictures", tmp_path)
    assert one.version == elsewhere.version and one.version.startswith("2.0-")
    assert tiny("llava-clip-llama", "tiny_pairs", folder).version.startswith("1.5-")
    assert tiny("qwen3_vl", "tiny_pictures", folder).version != one.version  # other prompts
    utils = lmms_kit.tasks(tmp_path) / "utils.py"
    utils.write_text(utils.read_text().replace("% 2", "% 5"))
    changed = tiny("llava-clip-llama", "tiny_pictures", tmp_path)
    assert changed.version != one.version  # scored otherwise


@pytest.mark.parametrize(
    ("task", "file", "old", "new"),
    [
        ("tiny_pictures", "data.jsonl", '"answer": "yes"', '"answer": "no"'),
        ("tiny_pictures", "data.jsonl", '"question": "What is', '"question": "Who is'),
        ("tiny_pictures", "data.jsonl", '"seed": 10,', '"seed": 11,'),  # another picture
        ("tiny_pictures", "utils.py", "def picture(", "OTHER = 1\n\n\ndef picture("),
        ("tiny_videos", "1.mp4", None, None),
    ],
)
def test_an_own_task_counts_by_what_it_asks_and_shows(folder, tmp_path, task, file, old, new):
    one = tiny("llava-clip-llama", "tiny_pictures", folder) if old else None
    path = lmms_kit.tasks(tmp_path) / file
    if old is None:
        one = tiny("llava-clip-llama", task, tmp_path)
        lmms_kit.write_video(path, seed=99, frames=7, width=64, height=48)
    else:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    assert tiny("llava-clip-llama", task, tmp_path).version != one.version


def test_the_version_of_a_shipped_task_is_as_it_was():
    """It is part of the ids of everybody's finished cells."""
    model, processor = embedded.load_model()
    (task,) = benchmarks([embedded.TASK], model, processor, limit=2)
    (same,) = benchmarks([embedded.TASK], model, processor, limit=3)
    assert task.version == same.version == version_of(task.task, len(task.task.eval_docs))


def test_errors(folder, monkeypatch):
    for retried in (ConfigurableTask.download, ConfigurableTask.process_results):
        monkeypatch.setattr(retried.retry, "sleep", lambda seconds: None)
    model, processor = zoo.CASES["llava-clip-llama"].model(), lmms_kit.PROCESSORS["llava_next"]()
    path = str(lmms_kit.tasks(folder))
    with pytest.raises(TaskError, match=r"'tiny_picture'\. Did you mean: tiny_pictures"):
        benchmarks(["tiny_picture"], model, processor, include_path=path)
    with pytest.raises(TaskError, match="cannot be loaded"):
        (lmms_kit.tasks(folder) / "tiny_lost.yaml").write_text(
            lmms_kit.TASK.format(
                task="tiny_lost",
                visual="doc_to_visual",
                process="process_results",
                metric="exact_match",
                aggregation="mean",
                version="version: 1",
            ).replace("data.jsonl", "lost.jsonl")
        )
        benchmarks(["tiny_lost"], model, processor, include_path=path)
    benchmark = tiny("llava-clip-llama", "tiny_failing", folder)
    with pytest.raises(KeyError, match="no such answer"):
        benchmark.run()
    assert not hasattr(benchmark.lm.model, "_vlmprune_handle")
    with pytest.raises(vlmprune.VlmpruneError):
        benchmark.run((vlmprune.method("cdpruner", keep_ratio=0.5),))


def test_without_lmms_eval(monkeypatch):
    monkeypatch.setitem(sys.modules, "lmms_eval.models", None)
    with pytest.raises(MissingLmmsError, match=r"pip install 'vlmprune\[lmms\]'"):
        benchmarks(["gqa"], None, None)


def test_runs_leave_no_trace(folder, capfd):
    """No bars, nothing on stdout, and the seeds and the environment as they were."""
    benchmark = tiny("llava-clip-llama", "tiny_pictures", folder)
    state, environment = torch.get_rng_state(), dict(os.environ)
    benchmark.run()
    assert torch.equal(state, torch.get_rng_state())
    assert dict(os.environ) == environment
    out, err = capfd.readouterr()
    assert out == ""
    assert "it/s" not in err


@pytest.mark.slow
def test_sweeps_of_local_tasks(folder, tmp_path):
    """The command: one process, two processes, the same cells; a failing task fails alone."""
    model = lmms_kit.checkpoint("llava-clip-llama", folder)
    path = lmms_kit.tasks(folder)
    words = [
        *("sweep", "--model", model, "--tasks", "tiny_pairs,tiny_failing"),
        *("--include_path", path, "--methods", "divprune", "--budgets", 0.25, "--limit", 4),
        *("--device", "cpu", "-b", 2, "-s", "-o"),
    ]
    alone = [sys.executable, "-m", "vlmprune", *map(str, words), str(tmp_path / "one")]
    one = subprocess.run(alone, capture_output=True, text=True, cwd=tmp_path)
    two = torchrun("-m", "vlmprune", *words, tmp_path / "two", folder=tmp_path)
    assert one.returncode == 1, one.stderr
    assert "KeyError" in one.stderr and "KeyError" in two.stderr
    records = [read_records(tmp_path / name) for name in ("one", "two")]
    assert [r["status"] for r in records[0]] == ["ok"] * 2 + ["failed"] * 2
    for a, b in zip(*records, strict=True):
        assert (a["id"], a["status"]) == (b["id"], b["status"])
        assert b["hardware"]["processes"] == 2
        if a["status"] == "ok":
            for key in ("scores", "tokens", "flops"):
                assert a[key] == b[key], key
            assert all(math.isfinite(s["value"]) for s in a["scores"].values())
            samples = [tmp_path / n / "samples" / f"{a['id']}.jsonl" for n in ("one", "two")]
            assert samples[0].read_text() == samples[1].read_text()
            assert (tmp_path / "two" / b["examples"][3]["picture"]).exists()
    assert "tiny_pairs" in one.stdout
