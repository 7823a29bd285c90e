"""Sweeps: ids, the result file, resuming, failures, refusals, statistics and the table."""

from __future__ import annotations

import dataclasses
import io
import json
import logging

import pytest
import vlmprune
from rich.console import Console
from vlmprune.eval import results, stats
from vlmprune.eval.results import Config, ResultsError, Store, method_record
from vlmprune.eval.sweep import Cell, grid, sweep
from vlmprune.eval.table import sweep_table
from vlmprune.prune.budget import Budget

VERSIONS = {"vlmprune": "0.1.0", "torch": "2"}
HARDWARE = {"device": "cpu", "cpu": "a processor", "cpu_cores": 2, "torch_threads": 1}

BASE = Config(
    model="m",
    fingerprint="f",
    methods=(),
    positions=None,
    task="t",
    task_version="1",
    limit=4,
    seed=0,
    max_new_tokens=4,
    dtype="float32",
    attn_implementation="sdpa",
)


def cells(*names: str, budgets=("0.5", "0.25")) -> list[Cell]:
    calls = [vlmprune.method(name, keep_ratio=1.0) for name in names]
    return [
        Cell(dataclasses.replace(BASE, methods=(method_record(call),) if call else ()), call)
        for call in grid(calls, [Budget.parse(text) for text in budgets])
    ]


def measured(outcomes: str = "1101", share: float = 1.0) -> dict:
    correct = outcomes.count("1")
    low, high = stats.wilson(correct, len(outcomes))
    spread = stats.spread([0.010, 0.012, 0.011])
    return {
        "accuracy": {
            "value": correct / len(outcomes),
            "n": len(outcomes),
            "correct": correct,
            "low": low,
            "high": high,
            "by_kind": {"what": {"value": 1.0, "n": 2}},
            "outcomes": outcomes,
        },
        "tokens": {
            "in_per_image": 196.0,
            "kept_per_image": 196 * share,
            "average_per_layer": 196 * share,
            "per_layer": [196 * share] * 2,
            "text": 10.0,
            "generated": 2.0,
        },
        "flops": {
            "vision": 1e9,
            "projector": 1e8,
            "prefill": 2e9 * share,
            "lm_head": 1e6,
            "decode": 1e7,
            "first_token": 3.1e9 * share,
            "visual": 1e9 * share,
            "visual_share": share,
            "prefill_share": share,
            "first_token_share": share,
        },
        "times": dict.fromkeys(results.Times.__annotations__, spread),
        "kv_bytes": 2048.0,
        "peak_memory_bytes": None,
        "positions": None,
        "notes": [],
    }


class Runner:
    """Stands for the evaluation of a cell; raises what it is told to at the given cells."""

    def __init__(self, **raises: BaseException) -> None:
        self.raises = raises
        self.ran: list[str] = []

    def __call__(self, cell: Cell) -> dict:
        error = self.raises.get(cell.call.name if cell.call else "dense")
        if error is not None:
            raise error
        self.ran.append(str(cell))
        return measured(share=cell.call.budget.value if cell.call else 1.0)


def go(grid_, runner, folder, versions=VERSIONS, hardware=HARDWARE):
    return sweep(grid_, runner, Store(folder), batch_size=2, versions=versions, hardware=hardware)


# --- Ids -------------------------------------------------------------------------------------


def test_the_id_is_stable_across_versions_of_the_library():
    """A change here throws away everybody's finished cells: add a schema version instead."""
    assert BASE.id == "6b2c91918643dba4"
    assert cells("fastv")[1].config.id == "f3f7779f5b917651"


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Config)])
def test_every_part_of_the_configuration_changes_the_id(field):
    changed = cells("divprune")[1].config.methods if field == "methods" else "something else"
    assert dataclasses.replace(BASE, **{field: changed}).id != BASE.id


def test_budgets_and_fields_change_the_id():
    ids = {cell.config.id for cell in cells("divprune", "fastv", "random")}
    assert len(ids) == 7
    (one,) = {
        method_record(vlmprune.method("fastv", keep_ratio=0.5, layer=2))["fields"]["layer"],
    }
    other = dataclasses.replace(
        BASE, methods=(method_record(vlmprune.method("fastv", keep_ratio=0.5, layer=one + 1)),)
    )
    assert other.id not in ids


def test_dense_comes_first_once():
    calls = grid([vlmprune.method("grid", keep_ratio=1.0)], [Budget.parse("64")])
    assert [str(call) for call in calls] == ["None", "grid(keep_tokens=64)"]


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
    assert "accuracy" not in failed[0]
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
    assert record["schema"] == 1
    assert record["versions"] == VERSIONS and record["hardware"] == HARDWARE
    assert record["batch_size"] == 2 and record["seconds"] >= 0 and record["finished"]
    (method,) = record["config"]["methods"]
    assert method["name"] == "fastv" and method["fields"] == {"layer": 2}
    assert method["budget"] == {"word": "keep_ratio", "value": 0.5}
    assert Config(**record["config"]).id == record["id"]


def test_a_newer_schema_is_an_error_not_a_guess(tmp_path):
    store = Store(tmp_path)
    store.append({"schema": results.SCHEMA + 1, "id": "x", "status": "ok"})
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
    value, low, high = stats.paired_difference("1" * 50 + "0" * 50, "1" * 50 + "0" * 50)
    assert value == 0 and low < 0 < high and high - low < 0.08  # nothing changed: narrow
    _, low, high = stats.paired_difference("10" * 50, "01" * 50)
    assert high - low > 0.3  # the same shares, every question changed: wide
    value, low, high = stats.paired_difference("1" * 90 + "0" * 10, "1" * 60 + "0" * 40)
    assert value == pytest.approx(0.3) and low > 0.2
    with pytest.raises(ValueError, match="paired"):
        stats.paired_difference("11", "1")


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
    config = dataclasses.replace(
        BASE,
        methods=(method_record(vlmprune.method("fastv", average_tokens=64, layer=3)),),
        positions="original",
    )
    record = {"config": config.as_json(), "status": "ok"}
    assert results.variant(record) == "fastv(layer=3) [original]"
    assert results.budget_text(record) == "avg:64"
