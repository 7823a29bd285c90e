"""`vlmprune ask`: refusals before anything heavy, times with their spread, examples that are right,
and words that the embedded model does not know."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import vlmprune
from PIL import Image
from vlmprune.eval import cli, embedded
from vlmprune.eval.ask import _saved
from vlmprune.eval.asked import read_asked
from vlmprune.eval.stats import spread
from vlmprune.eval.vocabulary_note import unknown_words, vocabulary_note
from vlmprune.prune.registry import method_names

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def loaded():
    return embedded.load_model()


# --- Before anything heavy -------------------------------------------------------------------

PROGRAM = """
import sys
from vlmprune.eval.cli import main
code = main(sys.argv[1:])
heavy = {"torch", "transformers", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["sweep", "--methods", "divprune,fastw:layer=3@0.25"], "Did you mean: fastv"),
        (["sweep", "--config", "my.yaml"], "Did you mean: divprune"),
        (["bench", "model", "--methods", "grid@0.5+divprun"], "Did you mean: divprune"),
        (["ask", "a.png", "why?", "--method", "divprun", "--keep_ratio", "0.5"], "divprune"),
        (["ask", "no.png", "why?", "--method", "grid@0.5"], "'no.png' cannot be read: No such"),
        (["ask", "my.yaml", "why?", "--method", "grid@0.5"], "not a picture"),
        (["ask", "a.png", "--method", "grid@0.5"], "No QUESTION"),
        (["ask", "embedded:1260", "--method", "grid@0.5"], "embedded:0 to embedded:1259"),
        (["ask", "a.png", "why?", "--method", "grid@0.5", "--save", "kept.doc"], "kept.png"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_wrong_at_first_sight_is_refused_before_torch_is_imported(tmp_path, argv, says):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "my.yaml").write_text("methods: [divprun]")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *argv],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == "", done.stderr
    (said,) = done.stderr.splitlines()
    assert says in said


def test_the_names_that_are_known_early_are_those_of_the_registry():
    program = (
        "import sys; from vlmprune.eval.early import _known; print(*_known());"
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
    """All commands of README and help that ask the embedded model."""
    pages = [(ROOT / "README.md").read_text(), cli._ASK_EXAMPLES]
    lines = [line.partition("#")[0] for page in pages for line in page.splitlines()]
    return [re.split(" +", line.strip())[1:] for line in lines if " embedded:" in line]


def test_the_examples_are_answered_right_by_the_dense_model(loaded):
    from vlmprune.eval.embedded.evaluate import generated

    found = examples()
    assert len(found) >= 4
    asked = [read_asked(argv[1], None) for argv in found]
    for argv, question, said in zip(found, asked, generated(*loaded, asked), strict=True):
        assert embedded.is_correct(said, question.answer), argv


def test_the_readmes_command_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = next(argv for argv in examples() if "--save" in argv)
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    (right,) = re.findall("right answer: (.*)", out)
    assert f"| answer | {right} | {right} |" in out  # also on a quarter of the tokens
    times = [line for line in out.splitlines() if line.startswith(("| first", "| each"))]
    assert len(times) == 2 and all(re.search(r"-?\d+ % \(-?\d+ to -?\d+\)", t) for t in times)
    assert "does not know" not in err and (tmp_path / argv[argv.index("--save") + 1]).exists()


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


def test_the_command_says_so_on_stderr(tmp_path, capsys):
    assert cli.main(["ask", "embedded:0", "where is the hat ?", "--method", "grid@0.5"]) == 0
    out, err = capsys.readouterr()
    assert err.count("note: the model does not know 'where', 'hat'") == 1 and "know" not in out
