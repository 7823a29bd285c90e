"""Our model among those of lmms-eval: the stock wrappers' prompts and answers, errors, commands."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from kit import skips

pytest.importorskip("lmms_eval", reason=skips.why("lmms"))

from kit import lmms as lmms_kit
from kit import zoo
from kit.torchrun import WORLD, torchrun
from lmms_eval import models
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from vlmprune.eval.embedded import TASK
from vlmprune.eval.lmms.arguments import calls_of
from vlmprune.eval.lmms.model import VlmPrune
from vlmprune.eval.lmms.stock import wrapper_of
from vlmprune.eval.models.registry import known_families, known_family
from vlmprune.eval.tasks import TASKS_DIR
from vlmprune.prune.errors import (
    BudgetError,
    MethodFieldError,
    UnknownMethodError,
    UnsupportedFeatureError,
)

FRAMES = 6
BFLOAT16 = ("qwen2_5_vl", "qwen3_vl")  # of which the stock wrappers know no other


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lmms")


def evaluate(lm, task: str, folder: Path, *, name: str = "vlmprune", limit: int | None = None):
    """Answers by question, inputs of `generate` call by call, and all results."""
    seen: list[dict] = []
    model, generate = lm.model, lm.model.generate  # stock wrappers let go of it in the end

    def record(*args, **options):
        seen.append({k: v.clone() for k, v in options.items() if isinstance(v, torch.Tensor)})
        return generate(*args, **options)

    model.generate = record
    path = str(lmms_kit.tasks(folder))
    manager = TaskManager(include_path=path, include_defaults=False, model_name=name)
    results = simple_evaluate(
        model=lm, tasks=[task], task_manager=manager, limit=limit, bootstrap_iters=0
    )
    del vars(model)["generate"]
    samples = sorted(results["samples"][task], key=lambda sample: sample["doc_id"])
    answers = [sample["resps"][0][0] for sample in samples]
    asked = [sample["arguments"][0] for sample in samples]
    return answers, seen, asked, results


def ours(name: str, folder: Path, **options):
    options = {"num_frames": FRAMES} | lmms_kit.pixels(name) | options
    return VlmPrune(str(lmms_kit.checkpoint(name, folder)), device="cpu", **options)


def in_order(calls: list[dict]) -> list[dict]:
    return sorted(calls, key=lambda call: call["input_ids"].tolist())


# --- The stock wrappers ------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of what the stock wrappers do
@pytest.mark.parametrize(
    ("name", "task"),
    [(name, "tiny_pictures") for name in lmms_kit.PROCESSORS]
    + [(name, "tiny_videos") for name in lmms_kit.PROCESSORS if zoo.CASES[name].packed],
)
def test_prompts_and_answers_are_those_of_the_stock_wrapper(name, task, folder, monkeypatch):
    wrapper = wrapper_of(zoo.CASES[name].reference())
    options: dict = {"device": "cpu", "device_map": "cpu"}
    options |= lmms_kit.pixels(name)
    options |= {"max_num_frames": FRAMES} if zoo.CASES[name].packed else {}
    options |= {} if zoo.CASES[name].packed else {"dtype": "float32"}
    cls = models.get_model(wrapper)
    if wrapper == "qwen2_vl":  # hands pictures on as JPEG: lossless here
        from lmms_eval.models.model_utils.media_encoder import encode_image_to_data_url

        lossless = {"image_format": "PNG", "mime_type": "image/png"}
        monkeypatch.setattr(
            cls, "_encode_image_data_url", lambda _, x: encode_image_to_data_url(x, **lossless)
        )
    stock = cls(pretrained=str(lmms_kit.checkpoint(name, folder)), **options)
    said, given, _, _ = evaluate(stock, task, folder, name=wrapper)
    lm = ours(name, folder, dtype="bfloat16" if wrapper in BFLOAT16 else "float32")
    answers, inputs, asked, results = evaluate(lm, task, folder)
    assert lm.wrapper == wrapper
    assert len(inputs) == len(given) == lmms_kit.QUESTIONS
    for mine, theirs in zip(in_order(inputs), in_order(given), strict=True):
        assert mine.keys() == theirs.keys()
        for key, tensor in mine.items():
            assert torch.equal(tensor, theirs[key].to(tensor.dtype)), key
    assert answers == said
    assert answers.count("") < 2  # the stock wrappers answer nothing where they fail
    start = {"qwen2_5_vl": "Look! ", "qwen3_vl": "See: ", "llava_hf": "Well: "}.get(wrapper, "")
    assert all(text.startswith(f"{start}What is this") for text in asked)
    new = {call["input_ids"].shape[0] for call in inputs}
    assert new == {1}
    logged = results["samples"][task]
    most = 4 if wrapper == "qwen3_vl" else 6  # as the task says to this wrapper alone
    assert max(s["token_counts"][0]["output_tokens"] for s in logged) == most


def test_every_family_has_a_wrapper():
    for name in known_families():
        assert models.get_model(known_family(name).wrapper)
    model = zoo.CASES["qwen2_5_vl"].model()
    model.config.model_type = "another"
    assert wrapper_of(model) == "vlmprune"


# --- Our model ---------------------------------------------------------------------------------


def test_the_entry_point_is_there_and_light():
    (found,) = entry_points(group="lmms_eval.models", name="vlmprune")
    assert found.value == "vlmprune.eval.lmms.manifest:manifests"
    assert models.get_model("vlmprune") is VlmPrune
    code = (
        "import sys, vlmprune.eval.lmms.manifest, vlmprune.eval.tasks; "
        "print(sorted({'torch', 'lmms_eval', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("name", lmms_kit.PROCESSORS)
def test_batches_answer_as_single_questions_do(name, folder):
    """Prompts of unequal length, one of them with two pictures, and for some families videos."""
    for task in [
        "tiny_pictures",
        *(["tiny_videos"] if zoo.CASES[name].layout.takes_videos else []),
    ]:
        pruned = {"method": "divprune", "keep_ratio": 0.3}
        single = evaluate(ours(name, folder, **pruned), task, folder)
        batch = evaluate(ours(name, folder, batch_size=3, **pruned), task, folder)
        assert single[0] == batch[0]
        assert [len(call["input_ids"]) for call in batch[1]] == [3, 3, 1]
        dense = evaluate(ours(name, folder), task, folder)
        assert dense[0] != single[0], "the patch changed nothing"
        logged = batch[3]["throughput"]
        kept, all_tokens = (logged[f"avg_visual_tokens{end}"] for end in ("_kept", ""))
        assert kept == pytest.approx(0.3 * all_tokens, rel=0.1)


@pytest.mark.parametrize("name", [n for n in zoo.PROCESSORS if n not in lmms_kit.PROCESSORS])
def test_models_of_further_families_answer(name, folder):
    """A prompt with two pictures and one with another in a batch, and what was kept of them."""
    case = zoo.CASES[name]
    lm = VlmPrune.of(case.model(), lmms_kit.processor_of(name), batch_size=2)
    lm.use(calls_of("divprune@0.5", None, {}, ()))
    answers, seen, _, results = evaluate(lm, "tiny_pictures", folder, limit=4)
    assert len(answers) == 4 and sorted(len(call["input_ids"]) for call in seen) == [2, 2]
    logged = results["throughput"]
    kept, all_tokens = (logged[f"avg_visual_tokens{end}"] for end in ("_kept", ""))
    assert kept == pytest.approx(0.5 * all_tokens, abs=0.5)


def test_requests_with_other_settings_are_other_batches(folder):
    lm = ours("llava-clip-llama", folder, batch_size=8)
    path = str(lmms_kit.tasks(folder))
    manager = TaskManager(include_path=path, include_defaults=False)
    tasks = manager.load_task_or_group(["tiny_pictures"], "chat")
    task = tasks["tiny_pictures"]
    task.build_all_requests(limit=5, rank=0, world_size=1)
    lm.task_dict["tiny_pictures"] = task.dataset
    for number, request in enumerate(task.instances):
        context, messages, generation, *rest = request.arguments
        generation = generation | ({"max_new_tokens": 2} if number in (1, 3) else {})
        request.arguments = (context, messages, generation, *rest)
    lengths = [found.token_counts.output_tokens for found in lm.generate_until(task.instances)]
    assert max(lengths[1], lengths[3]) <= 2 < max(lengths[0], lengths[4])
    texts = [found.text for found in lm.generate_until(task.instances)]
    alone = [lm.generate_until([request])[0].text for request in task.instances]
    assert texts == alone


def test_generation_settings():
    lm = VlmPrune("embedded", device="cpu")
    greedy = lm._generate({"until": ["\n\n"], "temperature": 0.0, "top_p": 1.0, "do_sample": True})
    assert greedy["do_sample"] is False and greedy["temperature"] is None
    assert greedy["max_new_tokens"] == 1024 and greedy["num_beams"] == 1
    sampled = lm._generate({"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 5})
    assert (sampled["do_sample"], sampled["temperature"], sampled["top_p"]) == (True, 0.7, 0.9)
    assert sampled["max_new_tokens"] == 5
    assert greedy["eos_token_id"] == lm.processor.tokenizer.eos_token_id


def test_a_failed_generation_is_raised(folder, monkeypatch):
    lm = ours("llava-clip-llama", folder)

    def broken(*args, **options):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(lm.model, "generate", broken)
    with pytest.raises(RuntimeError, match="out of luck"):
        evaluate(lm, "tiny_pictures", folder)
    assert not hasattr(lm.model, "_vlmprune_handle")


def test_the_model_outlives_an_evaluation(folder):
    lm = ours("llava-clip-llama", folder)
    first = evaluate(lm, "tiny_pictures", folder)[0]
    lm.use([])
    assert evaluate(lm, "tiny_pictures", folder)[0] == first


def test_videos_where_the_family_takes_none(folder):
    with pytest.raises(UnsupportedFeatureError, match="take no videos"):
        evaluate(ours("llava_next", folder), "tiny_videos", folder)


def test_requests_of_other_types():
    lm = VlmPrune("embedded", device="cpu")
    with pytest.raises(UnsupportedFeatureError, match="seedbench"):
        lm.loglikelihood([])
    with pytest.raises(UnsupportedFeatureError, match="one question"):
        lm.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"metod": "divprune"}, MethodFieldError, ["'metod'", "method"]),
        ({"method": "fastv", "keep_ratio": 0.5, "layr": 3}, MethodFieldError, ["'layr'", "layer"]),
        ({"method": "divprun", "keep_ratio": 0.5}, UnknownMethodError, ["divprune"]),
        ({"method": "divprune"}, BudgetError, ["needs a budget", "keep_ratio=0.25"]),
        ({"keep_ratio": 0.5}, BudgetError, ["without a method", "method=divprune"]),
        ({"method": "divprune@0.5", "keep_ratio": 0.5}, BudgetError, ["leave", "0.5"]),
        (
            {"method": "divprune", "keep_ratio": 0.5, "keep_tokens": 5},
            BudgetError,
            ["Two budgets"],
        ),
        ({"method": "divprune+fastv", "layer": 3}, MethodFieldError, ["'layer'"]),
        ({"batch_size": "auto"}, MethodFieldError, ["auto", "--batch_size 8"]),
        ({"max_pixels": 5000}, MethodFieldError, ["max_pixels", "Qwen"]),
        ({"fps": 2}, ValueError, ["num_frames"]),
    ],
)
def test_arguments_that_are_refused(arguments, error, words):
    with pytest.raises(error) as refused:
        VlmPrune("embedded", device="cpu", **arguments)
    assert all(word in str(refused.value) for word in words), refused.value


def test_arguments_that_are_read():
    lm = VlmPrune("embedded", "fastv", device="cpu", layer=3, average_tokens=120)
    (call,) = lm.calls
    assert call.method.fields()["layer"] == 3 and str(call.budget) == "average_tokens=120"
    lm = VlmPrune("embedded", "divprune@0.5+fastv:layer=3@0.25", device="cpu", max_batch_size=4)
    assert [call.method.name for call in lm.calls] == ["divprune", "fastv"]
    assert lm.batch_size == 1
    assert VlmPrune("embedded", "dense", 8, 4, "cpu").batch_size == 4


# --- Commands ----------------------------------------------------------------------------------


def files(folder: Path) -> tuple[dict, list[dict]]:
    """The results and the answers that a run of lmms-eval left."""
    (results,) = folder.rglob("*_results.json")
    (samples,) = folder.rglob("*_samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    return json.loads(results.read_text()), sorted(lines, key=lambda line: line["doc_id"])


@pytest.mark.slow
def test_the_commands_of_lmms_eval(tmp_path):
    """Alone and in two processes, with the embedded model on the embedded benchmark."""
    where = [
        subprocess.run(
            [sys.executable, "-m", "vlmprune", "where", what],
            capture_output=True,
            text=True,
            check=True,
        )
        for what in ("tasks", "task-name")
    ]
    folder, task = (done.stdout.strip() for done in where)
    assert (Path(folder), task) == (TASKS_DIR, TASK)
    words = [
        *("--model", "vlmprune", "--tasks", task, "--include_path", folder),
        *("--model_args", "pretrained=embedded,method=divprune,keep_ratio=0.1,device=cpu"),
        *("--limit", "15", "--batch_size", "4", "--log_samples", "--output_path"),
    ]
    alone = subprocess.run(
        [sys.executable, "-m", "lmms_eval", *words, str(tmp_path / "one")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert alone.returncode == 0, alone.stderr
    both = torchrun("-m", "lmms_eval", *words, tmp_path / "two", folder=tmp_path)
    assert both.returncode == 0, both.stderr
    for rank in range(WORLD):
        assert f"Running on rank {rank} (local rank {rank})" in both.stdout + both.stderr
    (one, said), (two, said_by_both) = files(tmp_path / "one"), files(tmp_path / "two")
    assert [line["doc_id"] for line in said] == list(range(15))
    answers = [line["filtered_resps"] for line in said]
    assert answers == [line["filtered_resps"] for line in said_by_both]
    score = one["results"][task]["exact_match,none"]
    assert (
        score
        == two["results"][task]["exact_match,none"]
        == pytest.approx(sum(line["exact_match"] for line in said) / 15)
    )
    assert one["throughput"]["avg_visual_tokens_kept"] == 20


FAILING = """
import sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from vlmprune.eval.lmms.model import VlmPrune
from vlmprune.eval.tasks import TASKS_DIR
from vlmprune.prune.errors import BudgetError

lm = VlmPrune("embedded", device="cpu")
assert lm.world_size == 2
if lm.rank == 1:
    def broken(*args, **options):
        raise BudgetError("only here")
    lm.model.generate = broken
manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=False)
try:
    simple_evaluate(model=lm, tasks=["tinyscenes"], task_manager=manager, limit=5)
except BudgetError as error:
    sys.stdout.write(f"raised-{lm.rank}\\n")
lm.processes.__exit__(None, None, None)
"""


@pytest.mark.slow
def test_an_error_in_one_process_is_raised_in_both(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    done = torchrun(script, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "raised-0" in done.stdout and "raised-1" in done.stdout
