"""The bench: any shape, dense beside oracle and patched; sizes alone; memory and energy."""

from __future__ import annotations

import json
import operator
import sys
import time
import types
from functools import partial

import pytest
import torch
from kit import skips
from kit.zoo import CASES
from vlmprune.adapters.cache_names import CACHE
from vlmprune.eval import cli
from vlmprune.eval.bench.bench_table import before_after_table
from vlmprune.eval.bench.decoding import Decoding, in_turn
from vlmprune.eval.bench.oracle import oracle_prefill
from vlmprune.eval.bench.rounds import cuts_of, longest, prefill, twin
from vlmprune.eval.bench.subject import Subject
from vlmprune.eval.bench.targets import targets, verdicts
from vlmprune.eval.bench.turns import Timed, take_turns
from vlmprune.eval.bench.variant import Variant
from vlmprune.eval.commands import bench_model as command
from vlmprune.eval.measure import energy
from vlmprune.eval.measure.flops import model_cost, visual_share
from vlmprune.eval.measure.memory import MemoryMeasureError, added_at_peak, in_fresh_process
from vlmprune.eval.models.shapes import SHAPES, prompt, shape, usual_picture
from vlmprune.eval.words.parts import parse

TINY = ["--layers", "4", "--width", "128", "--tokens", "16", "--repeats", "2", "--new_tokens", "2"]


def bench(path, *argv: str) -> list[dict]:
    assert cli.main(["bench", "model", *TINY, "-o", str(path), *argv]) == 0
    report = json.loads(path.read_text())
    assert (
        report["schema"] == 5
        and report["measured"]
        and report["versions"]["torch"]
        and report["hardware"]["cpu"]
    )
    return report["variants"]


def test_bench_compares_dense_oracle_and_patched(tmp_path, capsys):
    dense, grid, fastv = bench(
        tmp_path / "bench.json", "--methods", "grid,fastv", "--budgets", "0.25"
    )
    assert dense["methods"] == [] and dense["seconds"]["oracle_total"] is None
    assert dense["ratios"]["select_over_dense_prefill"] is None and dense["place"] is None
    assert [grid["place"], fastv["place"]] == ["before the LLM", "in the LLM decoder"]
    assert grid["kept"] == fastv["kept"] == 4
    assert grid["average_per_layer"] == 4 and fastv["average_per_layer"] == 10
    assert grid["average_after_cuts"] == 4 and fastv["average_after_cuts"] == 7
    # keys and values of a head of 128, float32, in 4 layers
    assert dense["cache_bytes"] == 2 * 128 * 4 * 4 * (16 + 40)
    assert grid["cache_bytes"] == 2 * 128 * 4 * 4 * (4 + 40)
    assert fastv["cache_bytes"] == 2 * 128 * 4 * 4 * (10 + 40)
    for variant in (grid, fastv):
        seconds = variant["seconds"]
        assert seconds["oracle_total"]["n"] == seconds["total"]["n"] == 2
        assert seconds["per_decoded_token"]["n"] == seconds["oracle_per_decoded_token"]["n"] == 2
        assert variant["first_token_flops"] < dense["first_token_flops"]
        assert all(ratio["n"] == 2 and ratio["median"] > 0 for ratio in variant["ratios"].values())
        assert variant["peak_memory_bytes"] is None  # not asked for
    out = capsys.readouterr().out
    assert "| grid(keep_ratio=0.25) |" in out
    assert "Cache MiB" in out and "Peak MiB" not in out


def test_bench_takes_several_methods_and_published_schedules(tmp_path):
    methods = ["--methods", "grid@0.5+fastv@3", "prumerge", "fastv"]
    dense, both, published = bench(tmp_path / "bench.json", *methods, "--budgets", "published")
    assert dense["name"] == "dense"
    assert both["name"] == "grid(keep_ratio=0.5)+fastv(keep_tokens=3)"
    assert [m["name"] for m in both["methods"]] == ["grid", "fastv"]
    assert both["average_per_layer"] == (8 + 8 + 3 + 3) / 4
    assert published["name"] == "prumerge(published)" and 1 <= published["kept"] <= 16


@pytest.mark.slow
def test_bench_measures_peak_memory_in_a_process_of_its_own(tmp_path, capsys):
    argv = ["--methods", "grid", "--budgets", "1", "--memory", "--repeats", "1", "--tokens", "1024"]
    dense, grid = bench(tmp_path / "bench.json", *argv)
    cache = 2 * 128 * 4 * 4 * (1024 + 40)
    assert dense["cache_bytes"] == cache and grid["kept"] == 1
    assert dense["peak_memory_bytes"] > cache  # float32 hidden states beside it
    assert dense["peak_memory_bytes"] > grid["peak_memory_bytes"] >= 0
    assert "Peak MiB" in capsys.readouterr().out


def test_bench_keeps_its_times_where_memory_cannot_be_measured(tmp_path, monkeypatch, capsys):
    def killed(*_):
        raise MemoryMeasureError("ended with -9")

    monkeypatch.setattr(command, "in_fresh_process", killed)
    argv = ["--methods", "grid", "--budgets", "0.5", "--memory"]
    for variant in bench(tmp_path / "bench.json", *argv):
        assert variant["seconds"]["total"]["n"] == 2 and variant["peak_memory_bytes"] is None
    captured = capsys.readouterr()
    assert captured.err.count("ended with -9") == 2 and "Peak MiB" not in captured.out


@pytest.mark.parametrize(
    "cuts", [[], [(0, 4)], [(2, 0)], [(0, 0)], [(0, 6), (2, 0)], [(1, 6), (3, 2)], [(0, 6), (0, 3)]]
)
def test_the_oracle_takes_any_counts(cuts):
    """Also none: every layer sees the text and as many visual tokens as are left."""
    subject = Subject(layers=4, width=128, visual_tokens=16)
    model = subject.model("cpu")
    seen: list[int] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((args or kwargs["hidden_states"])[0].shape[1]),
            with_kwargs=True,
        )
    inputs = subject.inputs("cpu")
    with torch.inference_mode():
        output = oracle_prefill(model, inputs, cuts)
        if not cuts:
            assert torch.allclose(output.logits, prefill(model, inputs).logits, atol=1e-5)
            seen = seen[:4]
        stored = [layer.keys.shape[2] for layer in output[CACHE].layers]
        Decoding(model, output, None).run(2)  # layers of different lengths go on side by side
    expected = [16] * 4
    for at, count in cuts:
        expected[at:] = [count] * (4 - at)
    assert seen[:4] == stored == [n + 40 for n in expected] and output.logits.shape[:2] == (1, 1)
    longer = [layer.keys.shape[2] for layer in output[CACHE].layers]
    assert longer == [n + 2 for n in stored]


# --- Peak memory -------------------------------------------------------------------------------


def test_peak_memory_is_what_was_added_and_given_back():
    # In a fresh process, as the bench does it: the heap of a long one has room that is resident.
    block = partial(operator.mul, b"x", 64 << 20)
    assert abs(in_fresh_process(added_at_peak, block) - (64 << 20)) < 16 << 20
    assert in_fresh_process(added_at_peak, partial(operator.mul, b"x", 1)) < 16 << 20


def test_a_fresh_process_answers_and_its_failure_is_said():
    assert in_fresh_process(max, 3, 7) == 7
    with pytest.raises(MemoryMeasureError, match="--memory"):
        in_fresh_process(int, "seven")


# --- Every family ------------------------------------------------------------------------------

FAMILIES = (
    "llava-clip-llama",
    "llava_next",
    "llava_onevision",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_vl",
)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("word", ["grid@5", "fastv:layer=1@5", "grid@9+fastv:layer=2@5"])
def test_the_oracle_of_every_family_is_as_long_as_the_patched_model(name, word):
    case = CASES[name]
    model, inputs = case.model(), case.inputs([(4, "A", 6)] * 2)
    variant = Variant(parse(word))
    seen: list[int] = []
    for layer in model.model.language_model.layers:
        layer.register_forward_hook(
            lambda module, args, kwargs, output: seen.append(output.shape[1]), with_kwargs=True
        )
    with torch.inference_mode():
        with variant.patched(model) as handle:
            prefill(model, inputs)
            cuts = cuts_of(handle)
        patched = seen.copy()
        seen.clear()
        logits = oracle_prefill(model, inputs, cuts).logits
        assert seen == patched and min(seen) < max(case.counts([(4, "A", 6)])) + 10
        assert logits.shape[:2] == (2, 1)
        if not case.fixed_positions:  # M-RoPE positions are not those of a text
            whole = oracle_prefill(model, inputs, []).logits
            assert torch.allclose(whole, prefill(model, inputs).logits, atol=1e-4)


# --- Shapes ------------------------------------------------------------------------------------

PUBLISHED = {  # parameters in billions, visual tokens, bytes of keys and values a token in float16
    "llava-1.5-7b": (7.063, 576, 2 * 32 * 4096 * 2),
    "llava-1.5-13b": (13.351, 576, 2 * 40 * 5120 * 2),
    "llava-next-7b": (7.063, 2928, 2 * 32 * 4096 * 2),
    "llava-onevision-7b": (8.030, 3699, 2 * 28 * 512 * 2),
    "qwen2.5-vl-7b": (8.292, 1296, 2 * 28 * 512 * 2),
    "qwen3-vl-8b": (8.767, 1024, 2 * 36 * 1024 * 2),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_named_shapes_have_the_sizes_of_their_checkpoints(name, tmp_path, capsys):
    billions, visual, per_token = PUBLISHED[name]
    file = tmp_path / "bench.json"
    argv = ["--shape", name, "--methods", "divprune", "--budgets", "0.25", "--dtype", "float16"]
    assert cli.main(["bench", "model", *argv, "--meta", "-o", str(file)]) == 0
    report = json.loads(file.read_text())
    model, (dense, pruned) = report["model"], report["variants"]
    assert report["measured"] is False and dense["seconds"]["total"] is None
    assert model["parameters"] / 1e9 == pytest.approx(billions, abs=5e-3)
    assert model["parameter_bytes"] == 2 * model["parameters"]
    assert model["visual_tokens"] == visual
    assert dense["cache_bytes"] == per_token * (visual + model["text_tokens"])
    assert pruned["cache_bytes"] == per_token * (pruned["kept"] + model["text_tokens"])
    assert pruned["kept"] == round(visual / 4)
    assert pruned["first_token_flops"] < dense["first_token_flops"]
    out = capsys.readouterr().out
    assert "NOT RUN" in out and "ms" not in out.split("|")[3:9]


def test_llava_flops_are_the_published_ones():
    """4nd^2 + 2n^2d + 3ndm of 32 layers over 576 tokens: 3.82 T."""
    subject = Subject(shape="llava-1.5-7b", dtype="float16")
    dense, fastv = Variant(()), Variant(parse("fastv@64"))
    for variant in (dense, fastv):
        variant.reckon(subject)
    decoder = model_cost(subject.model("meta")).decoder
    assert visual_share(fastv.per_layer, 576, decoder) == pytest.approx(
        (2 + 30 * 0.108) / 32, abs=2e-3
    )
    assert fastv.per_layer == [576] * 2 + [64] * 30


def test_what_adaptive_rules_may_keep_at_most_is_said(capsys):
    argv = ["--shape", "llava-small", "--methods", "prumerge", "--budgets", "published", "--meta"]
    assert cli.main(["bench", "model", *argv]) == 0
    assert "| prumerge(published) | <= 576.0 |" in capsys.readouterr().out


def test_a_shape_that_does_not_fit_is_not_run(capsys, monkeypatch):
    monkeypatch.setattr(command, "free_memory", lambda device: 10 << 30)
    argv = ["--shape", "llava-1.5-7b", "--methods", "grid", "--budgets", "64"]
    assert cli.main(["bench", "model", *argv]) == 0
    captured = capsys.readouterr()
    assert "needs about 39 GiB and 10.0 are free" in captured.err and "NOT RUN" in captured.out


@pytest.mark.parametrize("name", [name for name in SHAPES if name.endswith("-small")])
def test_small_shapes_and_their_usual_pictures(name):
    subject = Subject(shape=name)
    model, inputs = subject.model("meta"), subject.inputs("meta")
    assert 0.2e9 < sum(p.numel() for p in model.parameters()) < 0.7e9
    assert inputs["input_ids"].shape[0] == 1
    config = shape(name).config()
    assert (
        prompt(config, usual_picture(config), batch_size=2, device="meta")["input_ids"].dim() == 2
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--shape", "llava-1.6-7b"], "Did you mean: llava-1.5-7b"),
        (["--shape", "llava-small", "--picture", "300x300"], "336x336"),
        (["--shape", "llava-next-small", "--picture", "300x300"], "672x672"),
        (["--shape", "qwen2.5-vl-small", "--picture", "300x300"], "28"),
    ],
)
def test_wrong_shapes_and_pictures_are_errors(argv, said, capsys):
    assert cli.main(["bench", "model", *argv, "--meta"]) == 2
    assert said in capsys.readouterr().err


def test_a_checkpoint_is_measured_in_batches(tmp_path):
    file = tmp_path / "bench.json"
    argv = ["--model", "embedded", "--methods", "fastv", "--budgets", "49", "--batch_size", "3"]
    argv += ["--repeats", "1", "--new_tokens", "2", "-o", str(file)]
    assert cli.main(["bench", "model", *argv]) == 0
    report = json.loads(file.read_text())
    dense, fastv = report["variants"]
    model = report["model"]
    assert model["name"] == "embedded" and model["batch_size"] == 3
    assert model["visual_tokens"] == 196 and report["measured"]
    assert dense["average_per_layer"] == 196 and fastv["kept"] == 49
    assert dense["seconds"]["per_decoded_token"]["median"] > 0
    reckoned = Variant(())
    reckoned.reckon(Subject(model_name="embedded", batch_size=3))
    assert reckoned.cache_bytes == dense["cache_bytes"]


def test_a_text_encoder_is_made_for_methods_that_need_it():
    subject = Subject(layers=2, width=64, visual_tokens=16)
    assert subject.text_twin("meta", parse("grid@4")) is None
    variant = Variant(parse("cdpruner@4"))
    assert subject.text_twin("meta", variant.parts) is not None
    variant.reckon(subject)
    assert variant.visual_tokens == 16 and max(variant.per_layer) == 4


def test_a_twin_shares_the_weights_and_is_patched_alone():
    subject = Subject(layers=2, width=64, visual_tokens=16)
    model, inputs = subject.model("cpu"), subject.inputs("cpu")
    other = twin(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    with torch.inference_mode(), Variant(parse("grid@0.25")).patched(other):
        caches = [prefill(each, inputs)[CACHE] for each in (model, other)]
    stored = inputs["input_ids"].shape[1]
    assert [cache.layers[0].keys.shape[2] for cache in caches] == [stored, stored - 12]


def test_calls_take_turns_layer_by_layer_each_with_its_own_clock():
    subject = Subject(layers=2, width=64, visual_tokens=16)
    inputs, ran = subject.inputs("cpu"), []
    models = [subject.model("cpu"), subject.model("cpu")]
    for number, model in enumerate(models):
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    slow = models[1].model.vision_tower.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    calls = [Timed(partial(prefill, model, inputs), model) for model in models]
    take_turns(calls)
    slow.remove()
    assert ran in ([0, 1, 1, 0], [1, 0, 0, 1])
    assert torch.equal(calls[0].result.logits, calls[1].result.logits)
    assert 0 < calls[0].vision_seconds < calls[0].seconds < 0.2 < calls[1].seconds
    assert not any(layer._forward_pre_hooks for layer in models[0].model.vision_tower.modules())


def test_a_call_that_fails_ends_the_others():
    subject = Subject(layers=2, width=64, visual_tokens=16)
    models = [subject.model("cpu"), subject.model("cpu")]
    waiting = Timed(partial(prefill, models[0], subject.inputs("cpu")), models[0])
    with pytest.raises(ZeroDivisionError):
        take_turns([waiting, Timed(lambda: 1 / 0, models[1])])
    assert waiting.result is None
    assert not any(part._forward_pre_hooks for part in models[0].modules())


def test_decoding_in_turn_gives_each_its_own_steps():
    subject = Subject(layers=2, width=64, visual_tokens=16)
    model, inputs = subject.model("cpu"), subject.inputs("cpu")
    with torch.inference_mode():
        both = [Decoding(model, prefill(model, inputs), None) for _ in range(2)]
        seconds = in_turn(both, 3)
    assert [len(steps) for steps in seconds] == [3, 3] and min(map(min, seconds)) > 0
    stored = inputs["input_ids"].shape[1] + 3
    assert [one.output[CACHE].get_seq_length() for one in both] == [stored, stored]


def test_an_interrupted_bench_keeps_its_rounds(tmp_path, monkeypatch):
    rounds, whole = [], command.compare

    def compare(*args, **kwargs):
        rounds.append(args)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)

    monkeypatch.setattr(command, "compare", compare)
    file = tmp_path / "bench.json"
    argv = ["bench", "model", *TINY, "--methods", "grid", "--budgets", "4", "-o", str(file)]
    assert cli.main(argv) == 130
    variants = json.loads(file.read_text())["variants"]
    assert [v["seconds"]["total"]["n"] for v in variants] == [1, 1]
    assert list(tmp_path.iterdir()) == [file]


# --- Energy ------------------------------------------------------------------------------------


class FakeNvml(types.ModuleType):
    """A counter that runs 5 J at every look."""

    class NVMLError(Exception):
        pass

    def __init__(self, works: bool = True) -> None:
        super().__init__("pynvml")
        self.works = works
        self.millijoules = 0

    def nvmlInit(self) -> None:
        if not self.works:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.millijoules += 5000
        return self.millijoules


@pytest.fixture
def cuda(monkeypatch):
    energy.energy_meter.cache_clear()
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1234")
    )
    yield torch.device("cuda")
    energy.energy_meter.cache_clear()


def test_energy_is_the_difference_of_the_accelerators_counter(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    called = []
    assert energy.energy_meter(cuda).spent(lambda: called.append(1)) == 5 and called == [1]
    assert energy.energy_meter(torch.device("cpu")) is None


def test_energy_that_cannot_be_read_is_left_out_with_the_reason(cuda, monkeypatch, caplog):
    monkeypatch.setattr(energy.logger, "propagate", True)
    monkeypatch.setattr(energy.logger.parent, "propagate", True)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(works=False))
    assert energy.energy_meter(cuda) is None
    energy.energy_meter.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy.energy_meter(cuda) is None
    assert "Driver Not Loaded" in caplog.text and "vlmprune[energy]" in caplog.text


@pytest.mark.cuda
@skips.needs("gpu")
def test_a_gpu_is_timed_by_events_and_its_memory_is_known(tmp_path):
    file = tmp_path / "bench.json"
    argv = ["bench", "model", *TINY, "--device", "cuda", "--methods", "grid", "--budgets", "4"]
    assert cli.main([*argv, "-o", str(file)]) == 0
    for variant in json.loads(file.read_text())["variants"]:
        assert variant["peak_memory_bytes"] > 0
        assert 0 < variant["seconds"]["vision"]["median"] < variant["seconds"]["total"]["median"]


# --- What enters the figures -------------------------------------------------------------------


def test_a_method_that_only_attends_to_less_keeps_its_cache():
    """Compressing frees entries; attending reads fewer of them."""
    sizes = {}
    for word in ("divprune@1.0", "token_select@64", "elastic_cache@64"):
        variant = Variant(parse(word))
        variant.reckon(Subject(shape="qwen2.5-vl-7b", dtype="bfloat16"))
        sizes[word] = variant.cache_bytes
    per_entry = 2 * 28 * 4 * 128 * 2
    assert sizes["token_select@64"] == sizes["divprune@1.0"] == per_entry * (1296 + 42)
    assert sizes["elastic_cache@64"] == per_entry * (64 + 42)


def test_without_a_run_auto_is_half_precision(tmp_path, monkeypatch):
    file = tmp_path / "bench.json"
    argv = ["--shape", "llava-small", "--methods", "grid", "--budgets", "64", "--meta"]
    assert cli.main(["bench", "model", *argv, "-o", str(file)]) == 0
    report = json.loads(file.read_text())
    assert report["model"]["dtype"] == "bfloat16" and report["rounds"] == 0


@torch.inference_mode()
def test_in_a_batch_the_longest_sample_counts():
    """PruMerge finds its own count in every picture; the others are padded to the most."""
    case = CASES["llava-clip-llama"]
    model, inputs = case.model(), case.inputs([(4, "A", 6), (4, "B", 6), (4, "C", 6)])
    with Variant(parse("prumerge@published")).patched(model) as handle:
        prefill(model, inputs)
    counts = [sample[0] for sample in handle.last.tokens_per_layer]
    assert len(set(counts)) > 1, "the pictures must differ for this test"
    assert longest(handle) == [max(counts)] * 4
    assert cuts_of(handle) == [(0, max(counts))]


def test_a_picture_of_ones_own_goes_through_the_processor(tmp_path, capsys):
    from PIL import Image

    Image.new("RGB", (90, 60), "red").save(tmp_path / "red.png")
    file = tmp_path / "bench.json"
    argv = ["--methods", "grid", "--budgets", "49", "--image", str(tmp_path / "red.png")]
    argv += ["--repeats", "1", "--new_tokens", "1", "-b", "2", "-o", str(file)]
    assert cli.main(["bench", "model", "--model", "embedded", *argv]) == 0
    report = json.loads(file.read_text())
    assert report["model"]["visual_tokens"] == 196
    assert report["rounds"] == report["rounds_wanted"] == 1
    assert report["model"]["text_tokens"] != 40  # the question's own
    assert cli.main(["bench", "model", "--shape", "llava-small", *argv]) == 2
    assert "--model" in capsys.readouterr().err


# --- Against the oracle ------------------------------------------------------------------------


def test_ragged_prompts_are_padded_in_the_oracle_as_well(tmp_path):
    argv = ["--methods", "grid", "fastv", "visual_press", "--budgets", "4", "-b", "3", "--ragged"]
    dense, grid, fastv, press = bench(tmp_path / "bench.json", *argv)
    assert dense["cache_bytes"] == 3 * 2 * 128 * 4 * 4 * (16 + 80)
    assert grid["ratios"]["decode_over_oracle"]["n"] == press["ratios"]["decode_over_oracle"]["n"]
    # Layers of different lengths would need masks that the unpatched model does not make.
    assert fastv["ratios"]["decode_over_oracle"] is None
    assert fastv["ratios"]["total_over_oracle"]["n"] == 2


@torch.inference_mode()
def test_the_oracle_of_ragged_prompts_sees_what_the_unpatched_model_sees():
    subject = Subject(layers=4, width=128, visual_tokens=16, batch_size=3, ragged=True)
    model, inputs = subject.model("cpu"), subject.inputs("cpu")
    assert inputs["attention_mask"].sum(1).tolist() == [16 + 40, 16 + 60, 16 + 80]
    own = prefill(model, inputs).logits
    assert torch.allclose(oracle_prefill(model, inputs, []).logits, own, atol=1e-5)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ragged"], "--batch_size 2"),
        (["--ragged", "-b", "2", "--image", "x.png", "--model", "embedded"], "--image"),
    ],
)
def test_ragged_needs_several_prompts(argv, said, capsys):
    assert cli.main(["bench", "model", *TINY, "--methods", "grid", *argv]) == 2
    assert said in capsys.readouterr().err


def spread_of(median: float, q1: float) -> dict:
    return {"median": median, "q1": q1, "q3": median, "n": 3}


def test_promises_are_kept_open_or_broken():
    model = {"visual_tokens": 2880, "ragged": True}
    variant = {
        "place": "before the LLM",
        "ratios": {
            "total_over_oracle": spread_of(1.049, 1.0),
            "decode_over_oracle": spread_of(1.03, 1.01),
            "vision_over_plain": None,
            "select_over_dense_prefill": spread_of(0.03, 0.021),
        },
    }
    found = {target.ratio: verdict for target, verdict in verdicts(model, variant).items()}
    assert found == {
        "total_over_oracle": "met",
        "decode_over_oracle": "open",
        "select_over_dense_prefill": "missed",
    }
    small = {"visual_tokens": 576, "ragged": False}
    limits = [[target.limit for target in targets(small, place)] for place in (None, "x")]
    assert limits == [[], [1.10, 1.02, 1.02, 0.01]]
    assert [t.limit for t in targets(small, "before the LLM")] == [1.03, 1.02, 1.02, 0.01]


def test_before_and_after_stand_side_by_side(tmp_path):
    reports = []
    for name, methods in (("before", ["grid"]), ("after", ["grid", "fastv"])):
        bench(tmp_path / name, "--methods", *methods, "--budgets", "4")
        reports.append(json.loads((tmp_path / name).read_text()))
    for row in before_after_table(*reports).rows:
        assert row[0] in ("grid(keep_tokens=4)", "fastv(keep_tokens=4)")
        assert all((" -> " in cell) == row[0].startswith("grid") for cell in row[2:6])
