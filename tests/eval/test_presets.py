"""Presets: their words mean something, their numbers have sources, records find what is theirs."""

from __future__ import annotations

import itertools
import statistics

import pytest
from kit import skips
from vlmprune.eval import cli
from vlmprune.eval.arguments.config import layered
from vlmprune.eval.arguments.sweep import sweep_parser
from vlmprune.eval.classify.pictures import IMAGENET
from vlmprune.eval.commands.presets import presets_table
from vlmprune.eval.presets import UnknownPresetError, benchmarks, preset, preset_names
from vlmprune.eval.presets.published import published_for
from vlmprune.eval.report.published import on_scale
from vlmprune.eval.results.averages import percent_of_dense
from vlmprune.eval.words.parts import grid, parse, parse_budgets
from vlmprune.prune.budget import PUBLISHED, Budget, MethodCall, plan, tokens_per_layer
from vlmprune.prune.contract import Decoder, ModelShape, Place, Tower
from vlmprune.prune.errors import BudgetError
from vlmprune.prune.registry import made_of, method, method_class

PRESETS = ("llava-1.5", "llava-next", "qwen2.5-vl")
"""Those of sweeps."""
ALL = ("deit-s", *PRESETS)
LLAVA = ModelShape(
    tower=Tower(num_layers=24, has_cls=True, text_twin=True),
    decoder=Decoder(num_layers=32, hidden_size=4096, intermediate_size=11008),
)
QWEN = ModelShape(
    tower=Tower(num_layers=32, has_cls=False, text_twin=False),
    decoder=Decoder(num_layers=28, hidden_size=3584, intermediate_size=18944),
)
IMAGES = {"llava-1.5": (LLAVA, 576), "llava-next": (LLAVA, 2880), "qwen2.5-vl": (QWEN, 1296)}
OUT_OF_REACH = {"fastv", "pyramiddrop", "sparsevlm"}  # before their first cuts, more enter layers


def config(name: str = "dense", budget: str | None = None, **others) -> dict:
    fields = others.pop("fields", {})
    methods = []
    if name != "dense":
        made = method(name, **fields, keep_ratio=1.0).method
        parsed = Budget.parse(budget) if budget else None
        as_json = {"word": parsed.word, "value": parsed.value} if parsed else None
        methods = [{"name": name, "fields": made.fields(), "budget": as_json}]
    usual = {
        "model": "llava-hf/llava-1.5-7b-hf",
        "fingerprint": "f",
        "positions": None,
        "task": "gqa",
        "task_version": "1",
        "limit": None,
        "seed": 0,
        "max_new_tokens": 16,
        "dtype": "float16",
        "attn_implementation": "sdpa",
    }
    return usual | {"methods": methods} | others


def record(*words, scores: dict[str, float] | None = None, **others) -> dict:
    unit = others.pop("unit", "share")
    better = others.pop("higher_is_better", True)
    made = {
        metric: {"value": value, "unit": unit, "n": 1, "higher_is_better": better}
        for metric, value in (scores or {"exact_match": 0.5}).items()
    }
    return {"status": "ok", "config": config(*words, **others), "scores": made}


def found(*words, **others) -> dict[str, float]:
    entries = published_for(record(*words, **others))
    assert len({entry.lineage for entry in entries}) == len(entries)
    return {entry.lineage: entry.value for entry in entries}


# --- What is in them -------------------------------------------------------------------------


def test_presets_are_found_by_name_and_others_are_told_the_nearest():
    assert tuple(preset_names()) == ALL
    with pytest.raises(UnknownPresetError, match=r"'llava1.5'.*Did you mean: llava-1.5"):
        preset("llava1.5")


@pytest.mark.parametrize("name", PRESETS)
def test_every_word_is_one_of_the_sweep_command(name):
    assert preset(name).command == "sweep"
    given = layered(sweep_parser(), config=None, preset_name=name)
    assert given["preset"] == name
    assert given["limit"] is None
    assert given["methods"] == list(preset(name).methods)
    assert given["budgets"] == list(preset(name).budgets)


@pytest.mark.parametrize("name", PRESETS)
def test_methods_reach_their_budgets_or_cut_too_late_to(name):
    shape, tokens = IMAGES[name]
    cells = grid(
        [parse(word) for word in preset(name).methods], parse_budgets(preset(name).budgets)
    )
    assert len(cells) > 20
    missed = set()
    for (part,) in cells[1:]:
        call = part.call
        try:
            stages = plan(tokens, [call], shape)
        except BudgetError:
            missed.add(part.method.name)
            continue
        if part.budget and part.budget.word == "average_tokens":
            entering = tokens_per_layer(tokens, stages, shape.decoder.num_layers)
            assert sum(entering) / len(entering) == pytest.approx(part.budget.value, abs=1)
    assert missed <= OUT_OF_REACH


def test_fastv_on_qwen_has_the_papers_averages():
    for word, share in zip(preset("qwen2.5-vl").methods[1:4], (1 / 3, 2 / 9, 1 / 9), strict=True):
        ((part,),) = [parse(word)]
        stages = plan(1000, [part.call], QWEN)
        assert sum(tokens_per_layer(1000, stages, 28)) / 28_000 == pytest.approx(share, abs=1e-3)


@skips.needs("lmms")
def test_tasks_and_metrics_are_those_of_lmms_eval():
    import pathlib
    import re

    import lmms_eval

    folder = pathlib.Path(lmms_eval.__file__).parent / "tasks"
    texts = {}  # the index itself takes seconds
    for file in folder.glob("*/*.yaml"):
        text = file.read_text(encoding="utf-8", errors="replace")
        for task in re.findall(r"^task:\s*\"?([\w-]+)", text, flags=re.M):
            texts[task] = text + "".join(
                f.read_text(encoding="utf-8") for f in file.parent.glob("_default*")
            )
    wanted = {task for name in PRESETS for task in preset(name).tasks}
    of_lmms = [b for b in benchmarks().values() if b.task != IMAGENET]
    assert wanted | {b.task for b in of_lmms} <= set(texts)
    for benchmark in of_lmms:
        for metric in benchmark.metric.split("+"):
            assert re.search(rf"metric:\s*\"?{metric}\b", texts[benchmark.task]), benchmark


@pytest.mark.parametrize("name", ALL)
def test_every_number_is_plausible_and_has_a_source(name):
    entries = preset(name).published
    assert len(entries) > (100 if name in PRESETS else 20)
    for entry in entries:
        assert 0.1 * entry.benchmark.full < entry.value <= entry.benchmark.full, entry
        assert "arXiv" in entry.source and entry.lineage, entry
        assert name not in PRESETS or any(w in entry.source for w in ("Table", "README.md")), entry
        if entry.method == "dense":
            assert entry.budget is None and not entry.fields
            continue
        budget = None if entry.budget == PUBLISHED else Budget.parse(entry.budget)
        made = made_of(entry.method, entry.fields)
        MethodCall(made, budget)
        assert budget or not made.wants_budget
    keys = [(e.lineage, e.method, str(e.fields), e.budget, e.benchmark.name) for e in entries]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", ALL)
def test_every_lineage_has_its_dense_model_and_one_source(name):
    entries = preset(name).published
    for lineage in {entry.lineage for entry in entries}:
        own = [entry for entry in entries if entry.lineage == lineage]
        assert len({entry.source for entry in own}) == 1
        dense = {entry.benchmark.name for entry in own if entry.method == "dense"}
        assert dense == {entry.benchmark.name for entry in own}


@pytest.mark.parametrize("name", ALL)
def test_pruned_models_are_seldom_above_their_dense_model(name):
    """A row under the wrong column would be."""
    entries = preset(name).published
    dense = {(e.lineage, e.benchmark.name): e.value for e in entries if e.method == "dense"}
    for entry in entries:
        assert entry.value < 1.1 * dense[entry.lineage, entry.benchmark.name], entry


PRINTED = {
    (
        "llava-1.5",
        "RESTORE",
    ): "96.0 96.8 98.1 96.8 96.9 97.5 96.5 91.8 84.5 97.2 95.6 96.3 96.3 95.5 "
    "75.2 80.9 90.6 93.0 93.8 92.8 92.2",
    ("llava-1.5", "TwigVLM"): "96.5 96.5 92.2 95.1 77.0 87.6",
    ("llava-1.5", "TransPrune"): "97.8 98.8 100.0 98.4 94.4",
    ("llava-next", "VisionZip"): "96.1 97.6 93.3 95.0 86.4 92.0",
    ("llava-next", "TwigVLM"): "97.6 88.2",
    ("llava-next", "TransPrune"): "98.9 99.3 99.8 98.4 95.5",
    ("qwen2.5-vl", "RESTORE"): "95.9 95.8 93.6 93.9 88.6 90.6 87.5 86.9 83.5",
}


@pytest.mark.parametrize(("name", "lineage"), PRINTED)
def test_numbers_give_the_averages_that_their_tables_print(name, lineage):
    """Of tables with all their benchmarks here: a slip in copying would show."""
    entries = [entry for entry in preset(name).published if entry.lineage == lineage]
    dense = {entry.benchmark: entry.value for entry in entries if entry.method == "dense"}
    rows: dict[tuple[str, ...], list[float]] = {}
    for entry in entries:
        if entry.method != "dense":
            run = (entry.method, str(entry.fields), str(entry.budget))
            rows.setdefault(run, []).append(100 * entry.value / dense[entry.benchmark])
    complete = [statistics.fmean(row) for row in rows.values() if len(row) == len(dense)]
    printed = [float(word) for word in PRINTED[name, lineage].split()]
    assert complete == pytest.approx(printed, abs=0.25)


def test_disagreeing_lineages_are_all_there():
    values = found("fastv", "avg:192")
    assert values == {"VisionZip": 52.7, "TwigVLM": 56.5, "RESTORE": 57.1}


def test_most_published_runs_are_cells_of_their_preset():
    """`--preset` alone gives something to put beside most of what it holds."""
    for name in ALL:
        words = grid(
            [parse(word) for word in preset(name).methods], parse_budgets(preset(name).budgets)
        )
        beside = set()
        for parts in words:
            of_cell = {"methods": [], "model": preset(name).model}
            for part in parts:
                budget = part.budget
                as_json = {"word": budget.word, "value": budget.value} if budget else None
                of_cell["methods"].append(
                    {"name": part.method.name, "fields": part.method.fields(), "budget": as_json}
                )
            for task in preset(name).tasks:
                cell = {"config": config(task=task) | of_cell}
                beside |= set(map(id, published_for(cell, [preset(name)])))
        assert len(beside) / len(preset(name).published) > 0.95


# --- What belongs beside a record ------------------------------------------------------------


@pytest.mark.parametrize(
    "model", ["llava-1.5-7b-hf", "liuhaotian/llava-v1.5-7b", "/m/LLaVA-1.5-7B"]
)
def test_models_are_known_by_any_spelling(model):
    assert found(model=model)["VisionZip"] == 61.9


@pytest.mark.parametrize("model", ["llava-hf/llava-1.5-13b-hf", "embedded", "other/7b"])
def test_other_models_have_no_published_numbers(model):
    assert found(model=model) == {}


def test_before_the_llm_a_count_an_average_and_a_share_are_one_budget():
    expected = found("visionzip", "avg:192")
    assert expected["VisionZip"] == 59.3 and expected["HoloV"] == 59.3
    for budget in ("192", "0.3333", "0.333"):
        assert found("visionzip", budget) == expected
    for budget in ("191", "avg:200", "0.32", "flops:0.3"):
        assert found("visionzip", budget) == {}


def test_inside_the_llm_they_are_not():
    assert found("fastv", "192") == {} == found("fastv", "0.333")


def test_fields_and_positions_must_be_those_of_the_published_run():
    assert found("fastv", "avg:192", fields={"layer": 3}) == {}
    assert found("fastv", "0.5", fields={"layer": 3}) == {"FastV": 60.4}
    assert found("fastv", "0.5") == {"TransPrune": 59.4}
    assert found("visionzip", "192", positions="repacked") == {}


def test_published_schedules_are_known_by_their_fields():
    assert found("sparsevlm", fields={"retain": 128})["HiPrune"] == 53.8
    assert found("sparsevlm", fields={"retain": 96}) == {}
    assert found("sparsevlm", "avg:192") == {}


def test_several_methods_at_once_were_never_published():
    made = record("visionzip", "192")
    made["config"]["methods"] *= 2
    assert published_for(made) == []


def test_measured_values_come_on_the_papers_scale():
    made = record(scores={"exact_match": 0.619})
    (entry, *_) = published_for(made)
    assert on_scale(made, entry) == pytest.approx(61.9)

    scores = {"mme_perception_score": 1500.0, "mme_cognition_score": 300.0}
    made = record(task="mme", scores=scores, unit="points")
    by_name = {entry.benchmark.name: entry for entry in published_for(made)}
    assert on_scale(made, by_name["MME"]) == 1800
    assert on_scale(made, by_name["MME-P"]) == 1500
    assert (
        on_scale(record(task="mme", scores={"mme_perception_score": 1.0}), by_name["MME"]) is None
    )


# --- Percent of dense ------------------------------------------------------------------------


def test_percent_of_dense_is_the_mean_over_tasks():
    records = [
        record(scores={"exact_match": 0.5}),
        record(task="mme", scores={"a": 1500.0, "b": 300.0}),
        record("visionzip", "192", scores={"exact_match": 0.45}),
        record("visionzip", "192", task="mme", scores={"a": 1200.0, "b": 300.0}),
        record("divprune", "192", scores={"exact_match": 0.5}),
    ]
    both, one = percent_of_dense(records)
    assert (both.variant, both.budget, both.tasks) == ("visionzip", "192", ("gqa", "mme"))
    assert both.by_task == pytest.approx({"gqa": 90.0, "mme": 80.0})
    assert both.average == pytest.approx(85)
    assert (one.tasks, one.average) == (("gqa",), 100.0)
    summed, _ = percent_of_dense(records, metrics={"mme": "a+b"})
    assert summed.by_task["mme"] == pytest.approx(100 * 1500 / 1800)


def test_percent_of_dense_takes_the_metric_that_papers_report():
    main, reported = "pope_accuracy", "pope_f1_score"
    records = [
        record(task="pope", scores={main: 0.9, reported: 0.8}),
        record("visionzip", "192", task="pope", scores={main: 0.9, reported: 0.6}),
    ]
    assert [share.average for share in percent_of_dense(records)] == pytest.approx([75])
    assert [share.average for share in percent_of_dense(records, {})] == pytest.approx([100])


def test_percent_of_dense_is_open_where_a_task_lacks_its_dense_model():
    records = [
        record(scores={"exact_match": 0.5}),
        record("visionzip", "192"),
        record("visionzip", "192", task="mme"),
    ]
    (found,) = percent_of_dense(records)
    assert found.by_task == {"gqa": 100.0, "mme": None}
    assert found.average is None
    other = percent_of_dense([record(limit=10), record("visionzip", "192")])
    assert [o.average for o in other] == [None]  # a dense model on other questions does not count
    zero = percent_of_dense([record(scores={"exact_match": 0.0}), record("visionzip", "192")])
    assert [z.average for z in zero] == [None]
    unknown = percent_of_dense([record(scores={"other": 0.5}), record("visionzip", "192")])
    assert [u.average for u in unknown] == [None]


def test_percent_of_dense_turns_errors_round_and_leaves_failures_out():
    worse = {"scores": {"wer": 0.4}, "higher_is_better": False}
    better = {"scores": {"wer": 0.2}, "higher_is_better": False}
    failed = {"status": "failed", "config": config("divprune", "64")}
    (found,) = percent_of_dense([record(**better), record("visionzip", "192", **worse), failed])
    assert found.average == pytest.approx(50)


def test_percent_of_dense_keeps_settings_apart():
    records = [
        *(record(seed=seed, scores={"m": 0.5}) for seed in (0, 1)),
        *(record("grid", "192", seed=seed, scores={"m": 0.4 + seed / 20}) for seed in (0, 1)),
    ]
    assert [each.average for each in percent_of_dense(records)] == pytest.approx([80, 90])


# --- The table -------------------------------------------------------------------------------


def test_the_command_lists_presets_with_all_sources(capsys):
    assert cli.main(["presets"]) == 0
    printed = capsys.readouterr().out
    for name, entry in itertools.product(ALL, preset("llava-1.5").published):
        assert f"| {name} |" in printed and entry.source in printed
    assert len(presets_table().rows) == len(ALL)
    lines = (presets_table().notes or "").splitlines()
    assert [line.partition(". ")[0] for line in lines] == [f"Sources of {n}" for n in ALL]


def test_the_command_shows_what_a_preset_holds(capsys):
    assert cli.main(["presets", "qwen2.5-vl"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (header,) = [line for line in lines if line.startswith("| Method")]
    assert [cell.strip() for cell in header.split("|")[4:6]] == ["GQA", "MME"]
    row = next(
        line for line in lines if line.startswith("| holov(scores=received) | 0.111 | HoloV")
    )
    assert "| 72.4 |" in row and "| 2006 |" in row
    assert any("TextVQA: here without the OCR tokens" in line for line in lines)
    assert cli.main(["presets", "qwen2.5vl"]) == 2
    assert "Did you mean: qwen2.5-vl" in capsys.readouterr().err


def test_places_decide_which_budgets_are_one():
    assert method_class("visionzip")().places == (Place.BEFORE_LLM,)
