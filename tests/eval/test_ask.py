"""`vlmprune ask`: refusals before anything heavy, times with their spread, examples that are right,
and words that the embedded model does not know."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import vlmprune
from kit.paths import ROOT
from PIL import Image
from vlmprune.eval import cli, embedded
from vlmprune.eval.arguments import ask, compare
from vlmprune.eval.commands.ask import _saved
from vlmprune.eval.compare.asked import read_all_asked, read_asked
from vlmprune.eval.image_file import InputError
from vlmprune.eval.results.statistics import spread
from vlmprune.eval.vocabulary_note import unknown_words, vocabulary_note
from vlmprune.prune.registry import method_names

timed_once = pytest.mark.usefixtures("timed_once")


@pytest.fixture(scope="module")
def loaded():
    return embedded.load_model()


# --- Before anything heavy -------------------------------------------------------------------

PROGRAM = """
import json, sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from vlmprune.eval.cli import main
found = []
for argv in json.load(sys.stdin):
    with redirect_stdout(StringIO()) as out, redirect_stderr(StringIO()) as err:
        try:
            code = main(argv)
        except SystemExit as stop:  # argparse's way out
            code = stop.code
    heavy = {"torch", "transformers", "matplotlib"} & set(sys.modules)
    found.append([code, out.getvalue(), err.getvalue(), sorted(heavy)])
json.dump(found, sys.stdout)
"""
WRONG = [
    (["sweep", "--methods", "divprune,fastw:layer=3@0.25"], "Did you mean: fastv"),
    (["sweep", "--config", "my.yaml"], "Did you mean: divprune"),
    (["sweep", "--budgets", "0.25,0.x"], "Budget '0.x' is not understood: write 0.25"),
    (["sweep", "--budgets", "1.5"], "Budget '1.5'"),
    (["sweep", "--tasks", "tinyscens"], "Did you mean: tinyscenes?"),
    (["sweep", "--kinds", "read,reel"], "Did you mean: rel?"),
    (["sweep", "--methods", "grid", "-o", "a.png/runs"], "a.png is a file"),
    (["bench", "model", "--budgets", "many"], "Budget 'many' is not understood"),
    (["bench", "model", "--methods", "grid@0.5+divprun"], "Did you mean: divprune"),
    (["ask", "a.png", "why?", "--method", "divprun", "--keep_ratio", "0.5"], "divprune"),
    (["ask", "no.png", "why?", "--method", "grid@0.5"], "'no.png' cannot be read: No such"),
    (["ask", "my.yaml", "why?", "--method", "grid@0.5"], "not a picture"),
    (["ask", "a.png", "--method", "grid@0.5"], "No QUESTION"),
    (["ask", "embedded:1260", "--method", "grid@0.5"], "embedded:0 to embedded:1259"),
    (["ask", "a.png", "why?", "--method", "grid@0.5", "--save", "kept.doc"], "kept.png"),
    (["compare", "a.png", "why?", "--methods", "grid,divprun"], "Did you mean: divprune"),
    (["compare", "a.png", "no.png", "why?", "--methods", "grid@0.5"], "'no.png' cannot"),
    (["compare", "a.png", "a.png", "--methods", "grid@0.5"], "No QUESTION behind"),
    (["compare", "a.png", "--methods", "grid@0.5"], "No QUESTION"),
]


def test_what_is_wrong_at_first_sight_is_refused_before_torch_is_imported(tmp_path):
    """In one process for all, as one that imports nothing takes longer to begin than to refuse."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "my.yaml").write_text("methods: [divprun]")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps([argv for argv, _ in WRONG]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for (argv, says), found in zip(WRONG, json.loads(done.stdout), strict=True):
        code, out, err, heavy = found
        assert (code, out, heavy) == (2, "", []), (argv, err)
        (said,) = err.splitlines()
        assert says in said, argv


def test_the_names_that_are_known_early_are_those_of_the_registry():
    program = (
        "import sys; from vlmprune.eval.arguments.early import _known; print(*_known());"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) <= set(method_names())
    assert {"divprune", "fastv", "visual_press"} <= set(done.stdout.split())


# --- Times -----------------------------------------------------------------------------------


def test_shares_of_time_have_their_spread():
    before, after = spread([10.0, 11.0, 12.0, 13.0]), spread([5.0, 6.0, 7.0, 8.0])
    assert _saved(before, after) == "43 % (33 to 53)"
    assert _saved(before, spread([6.0])) == _saved(spread([6.0]), after) == ""


# --- Examples --------------------------------------------------------------------------------


def examples() -> list[list[str]]:
    """All commands of the page and of help that ask the embedded model."""
    pages = [(ROOT / "eval" / "README.md").read_text(), ask.EXAMPLES, compare.EXAMPLES]
    lines = [line.partition("#")[0] for page in pages for line in page.splitlines()]
    return [re.split(" +", line.strip())[1:] for line in lines if " embedded:" in line]


def test_the_examples_are_answered_right_by_the_dense_model(loaded):
    from vlmprune.eval.embedded.evaluate import generated

    found = examples()
    assert len(found) >= 4
    words = {word for argv in found for word in argv if word.startswith("embedded:")}
    asked = {word: read_asked(word, None) for word in sorted(words)}
    said = generated(*loaded, list(asked.values()))
    right = [embedded.is_correct(s, q.answer) for s, q in zip(said, asked.values(), strict=True)]
    assert len(asked) >= 3 and dict(zip(asked, right, strict=True)) == dict.fromkeys(asked, True)


def test_the_command_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = next(argv for argv in examples() if argv[0] == "ask" and "--save" in argv)
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    (right,) = re.findall("right answer: (.*)", out)
    assert f"| answer | {right} | {right} |" in out  # also on a quarter of the tokens
    times = [line for line in out.splitlines() if line.startswith(("| first", "| each"))]
    assert len(times) == 2 and all(re.search(r"-?\d+ % \(-?\d+ to -?\d+\)", t) for t in times)
    assert "does not know" not in err and (tmp_path / argv[argv.index("--save") + 1]).exists()
    assert "Grey: dropped.\nWhite lines: kept as it is.\n" in err  # the picture itself has no words


@timed_once
def test_a_picture_that_cannot_be_written_is_one_line_below_the_answers(tmp_path, capsys):
    (tmp_path / "kept.png").mkdir()
    argv = ["ask", "embedded:24", "--method", "grid@0.5", "--save", str(tmp_path / "kept.png")]
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert "| answer | eight five three |" in out
    assert err == f"vlmprune ask: error: --save '{tmp_path / 'kept.png'}': Is a directory.\n"


# --- compare ---------------------------------------------------------------------------------


@timed_once
def test_compare_asks_the_same_about_several_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number, name in ((0, "one.png"), (7, "two.png")):
        embedded.questions()[number].image.save(name)
    argv = ["compare", "one.png", "two.png", "what color is the shirt ?", "--answer", "blue"]
    methods = ["--methods", "divprune,cdpruner@9", "fastv:layer=3", "--keep_ratio", "0.2"]
    assert cli.main([*argv, *methods, "--repeats", "1", "--save", "all.png"]) == 0
    out, err = capsys.readouterr()
    assert "embedded, one.png: what color is the shirt ? (right answer: blue)" in out
    names = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| ")]
    table = [
        "| Method",
        "| ---",
        "| dense",
        "| divprune@0.2",
        "| cdpruner@9",
        "| fastv:layer=3@0.2",
    ]
    assert names == table * 2 and "| dense | blue | 196 |" in out
    assert err.count("not applicable: cdpruner compares image") == 1
    with Image.open("all.png") as drawn:
        assert drawn.width > 3 * 300 and drawn.height > 2 * 400


@timed_once
def test_compare_takes_several_budgets(capsys):
    argv = ["compare", "embedded:18", "--methods", "grid", "pyramiddrop", "--repeats", "1"]
    assert cli.main([*argv, "--budgets", "0.5,published"]) == 0
    out = capsys.readouterr().out
    names = [line.split(" | ")[0] for line in out.splitlines() if line.startswith("| ")]
    assert names[3:] == ["| grid@0.5", "| pyramiddrop@0.5", "| pyramiddrop@published"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--methods", "grid"], "grid needs a budget: give one of --keep_ratio"),
        (["--methods", "grid", "--budgets", "published"], "grid needs a budget"),
        (["--methods", "grid@0.5", "--keep_ratio", "0.5"], "leave --keep_ratio 0.5 out"),
        (["--methods", "fastv:layr=3@0.5"], "Did you mean: layer"),
        (["--methods", "cdpruner@0.5"], "cdpruner"),
    ],
)
def test_compare_says_what_to_type(argv, says, capsys):
    assert cli.main(["compare", "embedded:18", *argv]) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert says in said


# --- Words that the embedded model does not know ---------------------------------------------


def test_unknown_words_are_named(loaded):
    _, processor = loaded
    known = [question.question for question in embedded.questions()]
    assert unknown_words(processor, known) == [] and vocabulary_note(processor, known) is None
    assert unknown_words(processor, ["What HAT is the hat?", "a hat!"]) == ["HAT", "hat", "!"]
    note = vocabulary_note(processor, [" ".join(f"word{i}" for i in range(12))])
    assert "'word9' and 2 more" in note and "reads <unk>" in note
    assert vocabulary_note(object(), ["anything"]) is None


def test_the_note_counts_the_words_that_are_listed(loaded, capsys):
    assert cli.main(["where", "words"]) == 0
    listed = capsys.readouterr().out.split()
    assert f"knows {len(listed)} words" in vocabulary_note(loaded[1], ["hat"])
    assert unknown_words(loaded[1], listed) == [] and "shirt" in listed


def test_a_comparison_says_so(loaded):
    question = embedded.questions()[0]
    compared = vlmprune.compare(
        *loaded, question.image, "what color is the hat ?", "grid@0.5", max_new_tokens=2, repeats=1
    )
    (note,) = compared.notes
    assert note.startswith("the model does not know 'hat', and reads <unk> there")
    assert note in str(compared) and "does not know" in compared._repr_html_()


@timed_once
def test_the_command_says_so_on_stderr(tmp_path, capsys):
    assert cli.main(["ask", "embedded:0", "where is the hat ?", "--method", "grid@0.5"]) == 0
    out, err = capsys.readouterr()
    assert err.count("note: the model does not know 'where', 'hat'") == 1 and "know" not in out


@pytest.mark.parametrize("words", [["embeded:24"], ["cat.jpg"]])
def test_a_picture_that_is_not_there_is_named_before_a_missing_question(words):
    with pytest.raises(InputError, match=f"'{words[0]}' cannot be read"):
        read_all_asked(words)
