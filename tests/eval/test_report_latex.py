"""LaTeX tables: every line has its columns, nothing of a result file is read as TeX."""

from __future__ import annotations

import json
import re
import subprocess

from kit import skips
from kit.reports import fastv, record
from vlmprune.eval import cli

HOSTILE = r"\input{/etc/passwd} a_b & 50% #1 $x$ ^~ {}} <|> [0] é 中" + "\n\n\\end{table*}"
SPREAD = {"median": 0.625, "q1": 0.6, "q3": 0.7, "n": 3}
TIMES = {"times": record(1)["times"] | {"share_of_dense": SPREAD}}
ESCAPED = re.compile(r"\\[&%$#_{}\\]")


def table(tmp_path, *records) -> str:
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    out = tmp_path / "table.tex"
    assert cli.main(["report", str(tmp_path), "-o", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def rows(text: str) -> list[list[str]]:
    """The entries of every line of the body."""
    found = []
    for line in text.splitlines():
        if line.endswith(r" \\"):
            hidden = ESCAPED.sub("", line.removesuffix(r" \\"))
            found.append([entry.strip() for entry in hidden.split("&")])
    return found


def columns(text: str) -> list[int]:
    """How many columns there are, and how many each line has."""
    (spec,) = re.findall(r"\\begin\{tabular\}\{@\{\}([lr]+)@\{\}\}", text)
    return [len(spec), *map(len, rows(text))]


def balanced(text: str) -> bool:
    plain = ESCAPED.sub("", text)
    opened = re.findall(r"\\begin\{(.*?)\}", plain)
    return (
        plain.count("{") == plain.count("}")
        and opened == re.findall(r"\\end\{(.*?)\}", plain)[::-1]
    )


def one_task(text="plain"):
    return (
        record(2, fastv(), text=text, share=0.5, outcomes=(1, 0, 0, 1), **TIMES),
        record(1, text=text),
        record(3, fastv(0.25), text=text, status="failed", error={"type": "E", "message": text}),
    )


def of_task(one: dict, number: int, task: str) -> dict:
    return one | {"id": f"{number:016x}", "config": one["config"] | {"task": task}}


def test_one_task_has_its_numbers_and_dense_first(tmp_path):
    text = table(tmp_path, *one_task())
    head, dense, failed, pruned = rows(text)
    assert head[:5] == ["Method", "Budget", "Tokens", "FLOPs", "Time"]
    assert dense[0] == "dense" and dense[2:4] == ["9.0", "100.0"] and dense[4] == dense[6] == ""
    assert dense[5].startswith("75.0 {\\scriptsize [30.1, 95.4]}")
    assert pruned[:5] == ["fastv(layer=3)", "0.5", "4.5", "50.0", "62"]
    assert re.sub(r"\$|\\scriptsize|[{}]", "", pruned[6]).startswith("-25.0")
    assert failed[5] == "failed" and failed[2] == ""
    assert len(set(columns(text))) == 1 and balanced(text)
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    assert "4 questions" in text and "booktabs" in text


def test_tasks_stand_beside_each_other_and_are_averaged(tmp_path):
    some = one_task()[:2]
    tasks = ("gqa", "pope", "vqa_v2", "gqb")
    every = [of_task(one, 10 * i + j, t) for i, t in enumerate(tasks) for j, one in enumerate(some)]
    text = table(tmp_path, *every)
    above, _, dense, pruned = rows(text)
    assert above[5:] == ["gqa", "pope", "vqav2", "gqb", ""]  # an escaped _ is hidden here
    assert [entry.split()[0] for entry in pruned[5:9]] == ["50.0"] * 4
    assert "$-25.0$" in pruned[5] and "*" not in pruned[5]  # of four questions, nothing is sure
    assert dense[-1] == "100.0" and pruned[-1] == "66.7"
    assert len(set(columns(text))) == 1 and balanced(text)
    assert r"\resizebox{\linewidth}" in text and "graphicx" in text
    incomplete = table(tmp_path, *every[:-2], every[-1])  # dense of all, fastv without vqa_v2
    assert rows(incomplete)[-1][-1] == "" and len(set(columns(incomplete))) == 1


def test_a_difference_that_is_sure_has_a_star(tmp_path):
    right, wrong = [1] * 30, [1] * 10 + [0] * 20
    some = record(1, outcomes=right), record(2, fastv(), outcomes=wrong)
    every = [of_task(one, 2 * i + j, t) for i, t in enumerate("ab") for j, one in enumerate(some)]
    assert rows(table(tmp_path, *every))[-1][5].count("*") == 1


def test_models_have_tables_of_their_own(tmp_path):
    text = table(tmp_path, *one_task(), of_task(record(9, text="other"), 9, "plain"))
    assert text.count(r"\begin{tabular}") == 2 and balanced(text)
    assert text.count(r"\label{tab:vlmprune-1}") == text.count(r"\label{tab:vlmprune-2}") == 1


def test_texts_of_a_result_file_are_inert(tmp_path):
    text = table(tmp_path, *one_task(HOSTILE))
    assert r"\input" not in text and r"\textbackslash{}input\{/etc/passwd\}" in text
    assert "U+4E2D" in text and "é" in text
    assert text.count(r"\end{table*}") == 1 and balanced(text)
    assert len(set(columns(text))) == 1


@skips.needs("latex")
def test_it_compiles(tmp_path):
    table(tmp_path, *one_task(HOSTILE))
    packages = r"\usepackage[T1]{fontenc}\usepackage{booktabs,graphicx}"
    (tmp_path / "paper.tex").write_text(
        rf"\documentclass{{article}}{packages}\begin{{document}}\input{{table}}\end{{document}}"
    )
    argv = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
