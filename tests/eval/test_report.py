"""Reports: untrusted text stays text, files stay in their folder, the page works in a browser."""

from __future__ import annotations

import csv
import io
import json
import re

import pytest
from kit import chromium, skips
from kit.reports import fastv, record
from PIL import Image
from vlmprune.eval import cli
from vlmprune.eval.method_facts import what_it_does
from vlmprune.eval.report.cells import Cell, pareto, read_cells, sections
from vlmprune.eval.report.lm_eval import file_word
from vlmprune.eval.report.methods import described
from vlmprune.prune.methods.decoder.fastv import FastV

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\">|`a`\n# =1+1 {{7*7}}"


@pytest.fixture
def runs(tmp_path):
    """A folder of runs whose every text is hostile or plain."""

    def make(text="plain", **changed):
        folder = tmp_path / "runs"
        (folder / "pictures").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(folder / "pictures" / "0.png")
        error = {"type": "ValueError", "message": text, "traceback": text}
        records = [
            record(1, text=text, **changed),
            record(2, fastv(), text=text, share=0.5, outcomes=(1, 0, 0, 1), **changed),
            record(3, fastv(0.25), text=text, status="failed", error=error),
        ]
        lines = "".join(json.dumps(r) + "\n" for r in records)
        (folder / "runs.jsonl").write_text(lines, encoding="utf-8")
        return folder

    return make


def report(folder, out, *flags):
    assert cli.main(["report", str(folder), "-o", str(out), *flags]) == 0
    return out.read_text(encoding="utf-8") if out.is_file() else ""


def test_frontier_keeps_what_nothing_beats():
    points = [(1.0, 0.9), (0.5, 0.9), (0.5, 0.8), (0.2, 0.5), (0.1, 0.5), (None, 1.0)]
    assert pareto(points, higher_is_better=True) == [4, 1]
    assert pareto([(1.0, 2.0), (0.5, 3.0)], higher_is_better=False) == [1, 0]


def test_page_escapes_and_is_equal_for_equal_input(runs, tmp_path):
    folder = runs(HOSTILE)
    page = report(folder, tmp_path / "a.html")
    assert page == report(folder, tmp_path / "b.html")
    assert "<img src=x" not in page and page.count("</script>") == page.count("<script")
    assert "&lt;/script&gt;&lt;img" in page and "{{7*7}}" in page
    assert "http://" not in re.sub(r'<script type="text/plain".*?</script>', "", page)


@pytest.mark.parametrize(
    "name", ["../secret.png", "/etc/hostname", "pictures/gone.png", "pictures/link.png", "a\0b"]
)
def test_pictures_come_from_the_folder_only(runs, tmp_path, name):
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "secret.png")
    example = record(0)["examples"][0] | {"picture": name}
    folder = runs(examples=[example])
    (folder / "pictures" / "link.png").symlink_to(tmp_path / "secret.png")
    page = report(folder, tmp_path / "a.html")
    assert "data:image" not in page
    assert "missing" in page or "not shown" in page
    assert "data:image/png" in report(runs(), tmp_path / "b.html")  # the check can fail


def test_markdown_is_inert(runs, tmp_path):
    text = report(runs(HOSTILE), tmp_path / "a.md")
    outside = re.sub(r"(?ms)^(```+)$.*?^\1$", "", text)  # blocks of code hold it as it is
    assert outside.count("\n## ") == 2 and "<img" not in outside and "\n# =1+1" not in text
    rows = [line for line in text.splitlines() if line.startswith("| fastv")]
    assert rows and all(re.search(r"(?<!\\)`", row) is None for row in rows)


def test_csv_has_no_formulas_and_keeps_numbers(runs, tmp_path):
    rows = list(csv.DictReader(io.StringIO(report(runs("=1+1"), tmp_path / "a.csv"))))
    rows.sort(key=lambda row: row["id"])
    assert {row["model"] for row in rows} == {"'=1+1"}
    assert [float(row["value"]) for row in rows[:2]] == [0.75, 0.5]
    assert float(rows[1]["vs_dense"]) == -0.25
    assert rows[2]["status"] == "failed" and rows[2]["value"] == ""


def test_lm_eval_files(runs, tmp_path, capsys):
    folder, out = runs("org/model"), tmp_path / "out"
    (folder / "samples").mkdir()
    line = {"id": 0, "kind": "", "question": "q", "answer": "a", "prediction": "b", "score": 0.0}
    sample = folder / "samples" / f"{1:016x}.jsonl"
    sample.write_text(json.dumps(line) + "\n", encoding="utf-8")
    report(folder, out)
    said = capsys.readouterr().err
    assert "--log_samples" in said and "left out, failed" in said
    files = sorted((out / "org__model").iterdir())
    assert [f.name.split("_")[0] for f in files] == ["results", "results", "samples"]
    result = json.loads(files[0].read_text())
    assert result["results"]["org/model"]["accuracy,none"] == 0.75
    assert result["results"]["org/model"]["accuracy_stderr,none"] == pytest.approx(0.25)
    assert result["n-samples"]["org/model"] == {"original": 4, "effective": 4}
    assert result["pruning"]["tokens"]["in_per_image"] == 9.0
    assert json.loads(files[2].read_text())["filtered_resps"] == ["b"]


def test_names_are_no_way_out():
    assert "/" not in file_word("../../etc")
    assert file_word("..") == "_"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["gone.jsonl"], "cannot be read"),
        (["{empty}"], "no cells"),
        (["{foreign}"], "is no result"),
        (["{runs}", "-o", "a.pdf"], ".html, .md, .csv or .tex"),
        (["{runs}", "--format", "lm-eval"], "give a folder"),
        (["{runs}", "-o", "/proc/none/a.html"], "cannot be written"),
    ],
)
def test_errors_say_what_to_type(runs, tmp_path, capsys, argv, said):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "foreign.jsonl").write_text('{"schema": 3, "id": "a", "config": {}}\n')
    paths = {
        "runs": runs(),
        "empty": tmp_path / "empty.jsonl",
        "foreign": tmp_path / "foreign.jsonl",
    }
    assert cli.main(["report", *(word.format(**paths) for word in argv)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_finished_cell_stays_beside_its_failure(runs, tmp_path):
    other = tmp_path / "other.jsonl"
    error = {"type": "ValueError", "message": "no"}
    other.write_text(json.dumps(record(1, status="failed", error=error)) + "\n")
    (section,) = sections(read_cells([runs(), other]))
    assert section.dense is not None and len(section.missing) == 1


def test_it_is_said_what_each_method_does_and_what_grey_is(runs, tmp_path):
    folder = runs()
    page, text = report(folder, tmp_path / "a.html"), report(folder, tmp_path / "a.md")
    for said in (page, text):
        assert "After an early decoder layer, keep the visual tokens that the last prompt" in said
    assert "Grey: dropped." in page and "merged" in page and "KV cache" in page


def test_cells_of_another_code_are_said_to_be_left_out(tmp_path):
    def own(number, source, finished):
        entry = {"name": "mine", "fields": {}, "budget": None, "source": source}
        return record(number, [entry], finished=finished)

    old, new = own(2, "a", "2026-01-02T03:04:05+00:00"), own(3, "b", "2026-01-03T03:04:05+00:00")
    lines = "".join(json.dumps(one) + "\n" for one in (record(1), old, new))
    (tmp_path / "runs.jsonl").write_text(lines)
    page = report(tmp_path, tmp_path / "a.html")
    assert '<p class="warning said">Measured with another version of the method' in page
    assert "mine (1 cell)" in page


def test_the_sentence_of_an_own_method_is_that_of_its_class():
    class Own(FastV):
        """Own: keep what it likes.

        More of it.
        """

    assert what_it_does(Own) == "keep what it likes"
    assert what_it_does(FastV).startswith("after an early decoder layer")
    (section,) = sections([Cell(record(1, [{"name": "gone", "fields": {}, "budget": None}]), None)])
    ((name, sentence),) = described([section])
    assert name == "gone" and "not known" in sentence


def test_stdout_is_markdown(runs, capsys):
    assert cli.main(["report", str(runs())]) == 0
    assert capsys.readouterr().out.startswith("# vlmprune report\n")


@skips.needs("chromium")
def test_page_in_a_browser(runs, tmp_path):
    page = tmp_path / "a.html"
    report(runs(HOSTILE), page)
    with chromium.Browser() as browser:
        for width in (1280, 375):
            browser.open(page, width=width)
            browser.until("document.documentElement.dataset.charts === 'drawn'")
            assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
            assert browser.requests == [page.resolve().as_uri()]
            assert browser.errors == []
        assert browser.evaluate("!document.title.startsWith('owned')")
        assert browser.evaluate("document.querySelectorAll('img[src=x]').length") == 0
        # The cost axis switches, a point leads to its configuration, a heading sorts.
        plot = "document.querySelector('.plot')"
        browser.evaluate(
            "(() => { const s = document.querySelector('[data-choice=cost]'); s.value = 'tokens';"
            " s.dispatchEvent(new Event('change', {bubbles: true})); })()"
        )
        assert browser.evaluate(f"{plot}.data.find(t => t.name === 'dense').x") == [9]
        browser.evaluate(f"{plot}.emit('plotly_click', {{points: [{{customdata: 'cell-2'}}]}})")
        browser.until("document.getElementById('cell-2').open")
        first = "document.querySelector('tbody tr th').textContent"
        assert browser.evaluate(first).startswith("dense")
        browser.evaluate("document.querySelectorAll('thead button')[2].click()")
        assert browser.evaluate(first).startswith("fastv")
        # The page's policy stops a script that is not its own.
        browser.evaluate(
            "(() => { const s = document.createElement('script'); s.textContent = 'owned = 1';"
            " document.head.append(s); })()"
        )
        assert browser.evaluate("typeof owned") == "undefined"
