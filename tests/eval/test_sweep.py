"""Sweeps: ids, the result file, resuming, failures, refusals, statistics and the table."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import re

import pytest
import vlmprune
from kit.paths import STORED
from kit.sweeps import BASE, HARDWARE, VERSIONS, Cached, Runner, cells, go, measured
from rich.console import Console
from vlmprune.eval.embedded.task import EmbeddedTask
from vlmprune.eval.results import records as results
from vlmprune.eval.results import statistics as stats
from vlmprune.eval.results.records import Config, ResultsError, method_record
from vlmprune.eval.results.store import FILE_NAME, SCHEMA, Store, read_records
from vlmprune.eval.results.sweep_table import accuracy_table, sweep_table
from vlmprune.eval.results.task_kinds import kind_of
from vlmprune.eval.results.texts import setting_line
from vlmprune.eval.sweep.grid import Cell
from vlmprune.eval.tasks.protocols import TaskError
from vlmprune.eval.tasks.questions import asked
from vlmprune.eval.words.downsample import class_of
from vlmprune.eval.words.parts import Part, grid, parse, parse_budgets
from vlmprune.eval.words.said import parts_text
from vlmprune.prune.budget import Budget


def config(text: str, **others) -> Config:
    """The configuration of one word that names its budgets."""
    return dataclasses.replace(BASE, methods=tuple(map(method_record, parse(text))), **others)


# --- Ids -------------------------------------------------------------------------------------


def test_the_id_is_stable_across_versions_of_the_library():
    """A change here throws away everybody's finished cells: add a schema version instead."""
    assert BASE.id == "6b2c91918643dba4"
    assert cells("fastv")[1].config.id == "f3f7779f5b917651"


def test_a_method_alone_and_several_are_one_case_and_old_ids_stay():
    """Ids of runs that were stored before methods could be combined."""
    files = sorted(STORED.glob("sweep*.jsonl"))
    records = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    assert len(records) >= 88 and {r["schema"] for r in records} >= {1}
    for record in records:
        assert Config(**record["config"]).id == record["id"]
    words = {}
    for record in records:
        if record["config"]["positions"] is None:
            methods = record["config"]["methods"]
            words["+".join(_word(m) for m in methods)] = record
    assert "dense" not in words and "fastv:layer=2@0.25" in words and "" in words
    same = 0
    for word, record in words.items():
        methods = tuple(map(method_record, parse(word))) if word else ()
        if [m["fields"].keys() for m in methods] == [
            m["fields"].keys() for m in record["config"]["methods"]
        ]:  # a method that has gained a field since is another method
            assert Config(**{**record["config"], "methods": methods}).id == record["id"], word
            same += 1
    assert same >= 50


def test_a_field_that_a_method_has_lost_stays_in_ids():
    """Cells of before are found again, and nothing shows the field as one that was changed."""
    files = sorted(STORED.glob("sweep*.jsonl"))
    stored = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    alone = {
        r["config"]["methods"][0]["name"]: r for r in stored if len(r["config"]["methods"]) == 1
    }
    lost = {name: cls.retired for name in alone if (cls := class_of(name)).retired}
    assert len(lost) >= 7
    for name, retired in lost.items():
        config = alone[name]["config"]
        fields = config["methods"][0]["fields"]
        assert retired.items() <= fields.items()
        (now,) = map(method_record, parse(_word(config["methods"][0])))
        assert Config(**{**config, "methods": (now,)}).id == alone[name]["id"]
        shown = {said.partition("=")[0] for said in results.changed_fields(name, fields, 0)}
        assert not shown & retired.keys()


def _word(method: dict) -> str:
    """A recorded method as the command line writes it."""
    budget, known = method["budget"], class_of(method["name"])().fields()
    fields = "".join(f":{k}={v}" for k, v in method["fields"].items() if k in known)
    prefix = "avg:" if budget and budget["word"] == "average_tokens" else ""
    return f"{method['name']}{fields}@" + (f"{prefix}{budget['value']}" if budget else "published")


def test_stored_runs_are_recognised_by_a_new_sweep(tmp_path):
    """The same command on the file of a stored run has nothing left to do."""
    source = STORED / "sweep.jsonl"
    (tmp_path / FILE_NAME).write_bytes(source.read_bytes())
    stored = Store(tmp_path).read()
    base = Config(**stored[0]["config"])
    assert base.methods == [] and base.kinds is None
    names = dict.fromkeys(m["name"] for r in stored for m in r["config"]["methods"])
    budgets = ("published", "0.5", "0.25", "0.11")
    found = [
        Cell(dataclasses.replace(base, methods=tuple(map(method_record, parts))), parts)
        for parts in grid([parse(name) for name in names], parse_budgets(budgets))
    ]
    assert len(found) == len(stored)
    assert {results.setting_of(r) for r in stored} == {base.setting}
    summary = go(found, Runner(), tmp_path, stored[0]["versions"], stored[0]["hardware"])
    assert len(summary.skipped) == len(stored)


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config)])
def test_every_part_of_the_configuration_changes_the_id(field):
    changed = cells("divprune")[1].config.methods if field == "methods" else "something else"
    assert dataclasses.replace(BASE, **{field: changed}).id != BASE.id


def test_budgets_and_fields_change_the_id():
    ids = {cell.config.id for cell in cells("divprune", "fastv", "random")}
    assert len(ids) == 7
    assert config("fastv@0.5").id in ids
    assert config("fastv:layer=3@0.5").id not in ids


def test_dense_comes_first_once():
    assert list(map(str, cells("grid", "grid", budgets=["64"]))) == [
        "dense",
        "grid(keep_tokens=64)",
    ]


# --- Several methods at once -----------------------------------------------------------------


def test_parts_without_a_budget_take_the_cells():
    found = cells(
        "divprune@0.5+fastv", "divprune+fastv:layer=3", "grid@9", budgets=("0.3", "avg:8")
    )
    assert list(map(str, found)) == [
        "dense",
        "divprune(keep_ratio=0.5)+fastv(keep_ratio=0.3)",
        "divprune(keep_ratio=0.5)+fastv(average_tokens=8)",
        "divprune(keep_ratio=0.3)+fastv(layer=3, keep_ratio=0.3)",
        "divprune(average_tokens=8)+fastv(layer=3, average_tokens=8)",
        "grid(keep_tokens=9)",  # nothing to take: once
    ]
    assert [call.name for call in found[1].calls] == ["divprune", "fastv"]


def test_the_order_of_the_words_does_not_matter():
    (one,), (other,) = (
        cells(word)[1:] for word in ("fastv@9+divprune@0.5", "divprune@0.5+fastv@9")
    )
    assert one == other and one.config.id == other.config.id
    assert [m["name"] for m in one.config.methods] == ["divprune", "fastv"]
    assert one.config.id not in {config("divprune@0.5").id, config("fastv@9").id}


def test_published_is_for_those_with_a_schedule():
    found = cells(
        "fastv", "prumerge", "divprune@0.5+fastv", "fastv@0.5+prumerge", budgets=["published"]
    )
    assert list(map(str, found)) == [
        "dense",
        "prumerge(published)",
        "prumerge(published)+fastv(keep_ratio=0.5)",
    ]
    assert str(cells("prumerge@published", budgets=["0.5"])[1]) == "prumerge(published)"


@pytest.mark.parametrize(
    ("word", "error", "says"),
    [
        ("fastv@published", vlmprune.BudgetError, "fastv@0.25"),
        ("fastv@", vlmprune.BudgetError, "avg:64"),
        ("fastv@half", vlmprune.BudgetError, "avg:64"),
        ("fastv@0.25:layer=3", vlmprune.MethodFieldError, "fastv:layer=3@0.25"),
        ("fastv:keep_ratio=0.25", vlmprune.MethodFieldError, "fastv@0.5"),
        ("divprune+", vlmprune.UnknownMethodError, "Did you mean: divprune"),
        ("divprune+fastw", vlmprune.UnknownMethodError, "Did you mean: fastv"),
        ("+", vlmprune.UnknownMethodError, "Available"),
    ],
)
def test_a_wrong_word_says_what_to_type(word, error, says):
    with pytest.raises(error, match=re.escape(says)):
        parse(word)


def test_a_word_may_hold_any_value():
    (part,) = parse("catp:alignment=7e-1@avg:64")
    assert part.method.alignment == 0.7 and str(part.budget) == "average_tokens=64"
    (part,) = parse("catp:alignment=1e+0")
    assert part.method.alignment == 1 and part.open
    (part,) = parse("random@9", seed=4)
    assert part.method.seed == 4


def test_a_budget_that_a_method_cannot_have_is_not_applicable(tmp_path):
    """A method on the cache knows no average; the others of the sweep still run."""
    made = Part(Cached(), Budget("average_tokens", 8))
    cell = Cell(dataclasses.replace(BASE, methods=(method_record(made),)), (made,))
    summary = go([*cells("grid", budgets=["9"]), cell], Runner(), tmp_path)
    assert len(summary.ok) == 2
    ((refused, reason),) = summary.not_applicable
    assert refused is cell and "keep_ratio" in reason
    assert Store(tmp_path).read()[-1]["status"] == "not_applicable"


# --- Kinds of questions ----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Asked:
    id: int
    kind: str


class Task:
    name = "quiz"

    def questions(self, limit):
        return [Asked(i, "aabcc"[i % 5]) for i in range(10)][:limit]


def test_questions_of_some_kinds_take_turns():
    assert (
        [q.id for q in asked(Task(), 3, None)] == [q.id for q in asked(Task(), 3, ())] == [0, 1, 2]
    )
    assert [q.id for q in asked(Task(), None, ["b"])] == [2, 7]
    assert [q.id for q in asked(Task(), 5, ["b", "a"])] == [0, 2, 1, 7, 5]
    assert asked(Task(), 5, ["b", "a"]) == asked(Task(), 5, ["a", "b", "a"])
    with pytest.raises(TaskError, match="Did you mean: c\\? Available: a, b, c"):
        asked(Task(), None, ["a", "cc"])


def test_the_embedded_benchmark_asks_for_several_words():
    task = EmbeddedTask()
    read = asked(task, 9, ["read"])
    assert len(read) == 9 and all(len(q.answer.split()) >= 2 for q in read)
    some = [q for q in task.questions(None) if q.kind in ("read", "rel")]
    assert asked(task, None, ["rel", "read"]) == some  # its own order already takes turns


def test_kinds_are_part_of_the_id_only_where_they_are_given():
    assert "kinds" not in BASE.as_json()
    some = dataclasses.replace(BASE, kinds=("read", "rel"))
    assert some.id != BASE.id and some.setting != BASE.setting
    assert Config(**some.as_json()).id == some.id
    record = {"config": some.as_json()}
    assert results.setting_of(record) == some.setting
    assert "kinds: read rel, limit: 4" in setting_line(record["config"])


# --- Running and resuming --------------------------------------------------------------------


def test_a_finished_sweep_is_skipped(tmp_path):
    first, again = Runner(), Runner()
    assert len(go(cells("grid", "divprune"), first, tmp_path).ok) == 5
    summary = go(cells("grid", "divprune"), again, tmp_path)
    assert again.ran == [] and len(summary.skipped) == 5
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 5


def test_a_larger_grid_runs_only_what_is_new(tmp_path):
    go(cells("grid"), Runner(), tmp_path)
    more = Runner()
    go(cells("grid", "random", budgets=("0.5", "0.25", "0.1")), more, tmp_path)
    assert more.ran == [
        "grid(keep_ratio=0.1)",
        "random(keep_ratio=0.5)",
        "random(keep_ratio=0.25)",
        "random(keep_ratio=0.1)",
    ]


def test_an_interrupt_keeps_what_is_finished_and_a_rerun_does_the_rest(tmp_path):
    stopped = Runner(divprune=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        go(cells("grid", "divprune", "random"), stopped, tmp_path)
    assert stopped.ran == ["dense", "grid(keep_ratio=0.5)", "grid(keep_ratio=0.25)"]
    assert [r["status"] for r in Store(tmp_path).read()] == ["ok"] * 3
    rest = Runner()
    go(cells("grid", "divprune", "random"), rest, tmp_path)
    assert len(rest.ran) == 4 and not set(rest.ran) & set(stopped.ran)


def test_a_torn_last_line_counts_as_not_run(tmp_path):
    go(cells("grid"), Runner(), tmp_path)
    file = tmp_path / "runs.jsonl"
    file.write_bytes(file.read_bytes()[:-40])  # killed in the middle of a write
    rest = Runner()
    go(cells("grid"), rest, tmp_path)
    assert rest.ran == ["grid(keep_ratio=0.25)"]
    assert len(Store(tmp_path).read()) == 3
    assert json.loads(file.read_text().splitlines()[-1])["status"] == "ok"


def test_a_failed_cell_is_recorded_the_sweep_goes_on_and_a_rerun_tries_again(tmp_path):
    summary = go(cells("grid", "random"), Runner(grid=RuntimeError("out of luck")), tmp_path)
    assert [reason for _, reason in summary.failed] == ["RuntimeError: out of luck"] * 2
    assert len(summary.ok) == 3
    failed = [r for r in Store(tmp_path).read() if r["status"] == "failed"]
    assert [r["error"]["message"] for r in failed] == ["out of luck"] * 2
    assert "RuntimeError: out of luck" in failed[0]["error"]["traceback"]
    assert "scores" not in failed[0]
    again = Runner()
    assert len(go(cells("grid", "random"), again, tmp_path).ok) == 2
    assert all(r["status"] == "ok" for r in Store(tmp_path).read())  # the last line counts


@pytest.mark.parametrize(
    "error",
    [
        vlmprune.MissingSignalError("no CLS"),
        vlmprune.UnsupportedFeatureError("not here"),
        vlmprune.BudgetError("out of reach"),
        vlmprune.MethodFieldError("layer=30 of 6"),
    ],
)
def test_a_refusal_is_a_result_not_a_failure(tmp_path, error):
    summary = go(cells("vtc_cls"), Runner(vtc_cls=error), tmp_path)
    assert not summary.failed and len(summary.not_applicable) == 2
    records = [r for r in Store(tmp_path).read() if r["status"] == "not_applicable"]
    assert records[0]["error"] == {"type": type(error).__name__, "message": str(error)}
    # Asked again only by another version, which may support it.
    assert len(go(cells("vtc_cls"), Runner(vtc_cls=error), tmp_path).skipped) == 3
    newer = go(cells("vtc_cls"), Runner(), tmp_path, versions={**VERSIONS, "vlmprune": "9"})
    assert len(newer.ok) == 2


def test_other_versions_or_hardware_warn_on_resume(tmp_path, caplog):
    caplog.set_level(logging.WARNING, logger="vlmprune")
    logging.getLogger("vlmprune").propagate = True
    go(cells("grid"), Runner(), tmp_path)
    go(cells("grid"), Runner(), tmp_path)
    assert not caplog.records
    go(cells("grid"), Runner(), tmp_path, versions={**VERSIONS, "torch": "3"})
    assert "other versions (torch 2 -> 3)" in caplog.text
    go(cells("grid"), Runner(), tmp_path, hardware={**HARDWARE, "device": "cuda"})
    assert "other hardware (device cpu -> cuda)" in caplog.text


# --- The file --------------------------------------------------------------------------------


def test_records_carry_the_schema_and_everything_about_the_run(tmp_path):
    go(cells("fastv"), Runner(), tmp_path)
    record = Store(tmp_path).read()[1]
    assert record["schema"] == SCHEMA
    assert record["versions"] == VERSIONS and record["hardware"] == HARDWARE
    assert record["batch_size"] == 2 and record["seconds"] >= 0 and record["finished"]
    (method,) = record["config"]["methods"]
    assert method["name"] == "fastv" and method["fields"] == {"layer": 2}
    assert method["budget"] == {"word": "keep_ratio", "value": 0.5}
    assert Config(**record["config"]).id == record["id"]


def test_a_newer_schema_is_an_error_not_a_guess(tmp_path):
    store = Store(tmp_path)
    store.append({"schema": SCHEMA + 1, "id": "x", "status": "ok"})
    with pytest.raises(ResultsError, match="newer vlmprune"):
        store.read()


def test_an_unwritable_folder_is_a_clean_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResultsError, match="--output_path"):
        Store(tmp_path / "file" / "below")


# --- Statistics ------------------------------------------------------------------------------


def test_wilson_interval():
    low, high = stats.wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert stats.wilson(0, 10)[0] == 0 and stats.wilson(10, 10)[1] == 1
    assert stats.wilson(0, 0) == (0, 1)


def test_paired_difference_uses_the_pairing():
    half = [1.0] * 50 + [0.0] * 50
    value, low, high = stats.paired_difference(half, half)
    assert value == 0 and low < 0 < high and high - low < 0.08  # nothing changed: narrow
    _, low, high = stats.paired_difference([1.0, 0.0] * 50, [0.0, 1.0] * 50)
    assert high - low > 0.3  # the same shares, every question changed: wide
    value, low, high = stats.paired_difference([1.0] * 90 + [0.0] * 10, [1.0] * 60 + [0.0] * 40)
    assert value == pytest.approx(0.3) and low > 0.2
    with pytest.raises(ValueError, match="paired"):
        stats.paired_difference([1.0, 1.0], [1.0])


def test_a_difference_is_paired_by_questions_or_by_resamples():
    graded = [i % 10 / 10 for i in range(100)]
    better = [x + 0.05 for x in graded]
    a, b = (stats.mean_score(values) for values in (better, graded))
    assert stats.difference(a, b) == pytest.approx((0.05, 0.05, 0.05))  # each by the same
    assert a["high"] - a["low"] > 0.1
    totals = [
        stats.aggregate_score(
            sum(values), 100, unit="points", replicates=stats.resampled(values, sum)
        )
        for values in (better, graded)
    ]
    assert stats.difference(*totals) == pytest.approx((5, 5, 5))
    assert totals[0]["low"] < totals[0]["value"] < totals[0]["high"]
    alone = stats.aggregate_score(3.0, 100, unit="points")
    assert stats.difference(alone, totals[0])[1:] == (None, None)
    assert stats.mean_score([0.5])["low"] is None


def test_records_of_older_schemas_are_brought_up_to_date():
    for file in STORED.glob("sweep*.jsonl"):
        raw = [json.loads(line) for line in file.read_text().splitlines()]
        assert {record["schema"] for record in raw} <= {1, 2, 3, SCHEMA}
        known = {record["id"]: record for record in raw}
        for record in read_records(file):
            if record["status"] != "ok" or known[record["id"]]["schema"] >= 3:
                continue
            name, score = results.main_score(record)
            assert name == "accuracy" and "accuracy" not in record
            old = known[record["id"]]
            assert old["accuracy"]["correct"] == sum(score["outcomes"])


def test_stored_cells_keep_their_ids():
    """A cell that an older version measured is found again by its configuration."""
    found = [record for file in STORED.glob("*.jsonl") for record in read_records(file)]
    assert {kind_of(record["config"]).name for record in found} == {"answers", "classes"}
    assert all(Config(**record["config"]).id == record["id"] for record in found)


def test_spread():
    assert stats.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3, "q1": 2, "q3": 4, "n": 5}
    assert stats.spread([7.0]) == {"median": 7, "q1": 7, "q3": 7, "n": 1}
    assert stats.spread([]) is None


# --- The table -------------------------------------------------------------------------------


def test_the_table_pastes_as_markdown(tmp_path):
    run = Runner(vtc_cls=vlmprune.MissingSignalError("no CLS"), grid=RuntimeError("bad"))
    go(cells("grid", "vtc_cls", "fastv", budgets=("0.25", "0.5")), run, tmp_path)
    table = sweep_table(Store(tmp_path).read())
    lines = [line for line in table.markdown().splitlines() if line.startswith("|")]
    assert all(line.count("|") == 12 for line in lines)
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in lines[2:]]
    assert [row[:2] for row in rows] == [
        ["dense", ""],
        ["grid", "0.25"],
        ["grid", "0.5"],
        ["vtc_cls", "0.25"],
        ["vtc_cls", "0.5"],
        ["fastv", "0.5"],  # costliest first
        ["fastv", "0.25"],
    ]
    assert rows[1][2] == "FAILED" and rows[3][2] == "not applicable"
    dense, fastv = rows[0], rows[5]
    assert dense[2] == "75.0 [30.1, 95.4]" and dense[3] == ""
    assert fastv[3].startswith("+0.0 [")
    assert fastv[4:] == ["98/196", "98.0", "1", "50.0", "11.0 (1 %)", "11.0", "2"]
    assert "limit: 4" in table.title and "a processor" in table.title


@pytest.mark.parametrize(("width", "all_columns"), [(80, False), (160, True)])
def test_a_narrow_terminal_leaves_columns_out_instead_of_cutting_them(tmp_path, width, all_columns):
    go(cells("fastv"), Runner(), tmp_path)
    out = io.StringIO()
    sweep_table(Store(tmp_path).read()).print(
        Console(file=out, width=width, force_terminal=True, color_system=None)
    )
    text = out.getvalue()
    assert "75.0 [30.1, 95.4]" in text and "50.0" in text
    assert "…" not in text
    assert ("ms/token" in text.split("No room for")[0]) == all_columns
    assert ("No room for: ms/token" in text) != all_columns


def test_fields_and_positions_show_in_the_table():
    record = {"config": config("fastv:layer=3@avg:64", positions="original").as_json()}
    assert results.variant(record) == "fastv(layer=3) [original]"
    assert results.budget_text(record) == "avg:64"
    record = {"config": config("divprune@0.5+fastv:layer=3@9").as_json()}
    assert results.variant(record) == "divprune+fastv(layer=3)"
    assert results.budget_text(record) == "0.5+9"
    assert results.method_name(record) == "divprune+fastv"


def test_a_field_of_several_values_is_the_same_in_memory_and_in_the_file():
    parts = parse("pyramiddrop:layers=[1,2,3]@0.5")
    text = parts_text(parts)
    assert text == "pyramiddrop(layers=[1, 2, 3], keep_ratio=0.5)"
    record = {"config": config("pyramiddrop:layers=(1,2,3)@0.5").as_json()}
    assert results.variant(record) == "pyramiddrop(layers=[1, 2, 3])"
    stored = Config(**json.loads(json.dumps(record["config"])))
    assert stored.id == config("pyramiddrop:layers=[1,2,3]@0.5").id


def test_both_averages_show_where_they_differ():
    found = []
    for word, entering, behind in (
        ("fastv@0.25", 98, 73.5),
        ("grid@0.25", 49, 49),
        ("pool@0.25", 49, None),
    ):
        result = measured()
        result["tokens"] |= {"average_per_layer": entering}
        if behind is not None:  # older records lack it
            result["tokens"] |= {"average_after_cuts": behind}
        found.append({"config": config(word).as_json(), "status": "ok", **RAN, **result})
    table = sweep_table(found)
    column = table.headers.index("Avg/layer")
    assert [row[column] for row in table.rows] == ["98.0 (73.5)", "49.0", "49.0"]


def test_accuracies_of_methods_under_several_budgets_have_their_own_rows():
    words = (
        "divprune@0.5",
        "divprune@0.5+fastv@0.5",
        "divprune@0.5+fastv@0.25",
        "prumerge@published",
    )
    found = [
        {"config": config(word).as_json(), "status": "ok", **RAN, **measured()} for word in words
    ]
    table = accuracy_table(found)
    assert table.headers == ("Method", "0.5", "published", "several")
    assert table.rows == [
        ("divprune", "75.0", "", ""),
        ("divprune+fastv", "75.0", "", ""),
        ("divprune+fastv at 0.5 + 0.25", "", "", "75.0"),
        ("prumerge", "", "75.0 (196 a layer)", ""),
    ]


RAN = {"batch_size": 2, "hardware": HARDWARE}
