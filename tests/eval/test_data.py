"""`sweep --data my.jsonl`: lines and what is wrong with them, matching, and whole sweeps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from kit.fakes import picture
from kit.zoo import CASES, PROCESSORS, WHOLE_NAMES
from PIL import Image
from vlmprune.eval import cli, embedded
from vlmprune.eval.arguments import config
from vlmprune.eval.commands import sweep as sweep_command
from vlmprune.eval.image_file import read_picture
from vlmprune.eval.in_process import sweep_model
from vlmprune.eval.results.records import main_score
from vlmprune.eval.results.store import read_records
from vlmprune.eval.tasks.jsonl import CHOICE_INSTRUCTION, DataError, JsonlTask, read_all
from vlmprune.eval.tasks.matching import MATCHINGS, chosen, is_right
from vlmprune.eval.tasks.protocols import TaskError

pytestmark = pytest.mark.usefixtures("timed_once")


@pytest.fixture
def write(tmp_path):
    """Writes a file of lines beside three pictures, a.png to c.png."""
    for letter in "ABC":
        picture(letter).save(tmp_path / f"{letter.lower()}.png")

    def written(*lines: object, name: str = "my.jsonl") -> Path:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path = tmp_path / name
        path.write_text("\n".join(texts) + "\n", encoding="utf-8")
        return path

    return written


def line(**others: object) -> dict[str, object]:
    return {"image": "a.png", "question": "What is it?", "answer": "a cat"} | others


# --- Matching --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matching", "answer", "right", "wrong"),
    [
        ("exact", "A cat", ["a  cat.", "A CAT!"], ["cat", "a cat there", "", "acat"]),
        ("exact", "caf\u00e9", ["cafe\u0301"], ["cafe"]),
        ("contains", "cat", ["A black cat.", "cat"], ["concatenate", "cats", ""]),
        ("contains", "red cat", ["the Red, cat"], ["red and cat", "cat red"]),
        ("contains", "\u732b", ["\u767d\u732b\u3002"], ["\u72ac"]),
        ("number", "3", ["There are 3.", "three cats", "2.6", "3.0", "3,"], ["33", "2.4", "no"]),
        ("number", "3.14", ["3.1415", "about 3.14 m"], ["3.1", "3", "3.15", "-3.14"]),
        ("number", "-2", ["\u22122", "-1.5", "it is -2 C"], ["2", "5-2"]),
        ("number", "1234", ["1,234 people", "1234"], ["1", "1,2345"]),
        ("number", "0.5", [".5", "0.45"], ["5", "9" * 500]),
        ("number", "1e3", ["1000", "1,000.4"], ["1"]),
    ],
)
def test_matching(matching, answer, right, wrong):
    assert [said for said in right if not is_right(said, [answer], matching)] == []
    assert [said for said in wrong if is_right(said, [answer], matching)] == []


def test_any_of_several_answers_is_right():
    assert is_right("kitty", ["cat", "kitty"], "exact")
    assert is_right("5", ["3", "5"], "number")
    assert not is_right("dog", ["cat", "kitty"], "contains")


@pytest.mark.parametrize(
    ("said", "option"),
    [
        *dict.fromkeys(["B", "b", "(b)", "B.", " B) ", "B. a dog", "B: whatever"], 1).items(),
        *dict.fromkeys(["The answer is B", "answer: b.", "I think (B) is right"], 1).items(),
        *dict.fromkeys(["dog", "A dog", "It is a dog."], 1).items(),
        *dict.fromkeys(["It's a hot dog", "C", "hot dog"], 2).items(),
        *dict.fromkeys(["", "none", "D", "a cat and a dog", "Because"], None).items(),
        ("A", 0),
    ],
)
def test_what_was_chosen(said, option):
    assert chosen(said, ["cat", "dog", "hot dog"]) == option


def test_options_that_differ_by_signs_are_told_apart_where_they_can_be():
    assert chosen("x - 1", ["x + 1", "x - 1"]) == 1
    assert chosen("B", ["+", "-"]) == chosen("-", ["+", "-"]) == 1
    assert chosen("it is x 1", ["x + 1", "x - 1"]) is None
    assert chosen("2", ["1", "2"]) == 1


# --- Lines -----------------------------------------------------------------------------------


def test_lines_become_questions_whose_kinds_take_turns(write):
    path = write(
        line(kind="b", id="first", matching="contains", source="me"),
        "",
        line(image="b.png", kind="a", answer=None, answers=["x", 2.50], question=" why? "),
        line(kind="b", choices=["in", "out"], answer="b"),
    )
    task = JsonlTask(path, max_new_tokens=5)
    one, two, three = task.questions(None)
    assert (task.name, task.max_new_tokens, task.unread) == ("my", 5, ["source"])
    assert [q.id for q in (one, two, three)] == [3, "first", 4]
    assert one.question == "why?" and one.answers == ("x", "2.5") and one.matching == "exact"
    assert one.image.getpixel((0, 0)) == (1, 0, 0)
    assert two.kind == "b" and two.matching == "contains"
    assert three.question == "What is it?\nA. in\nB. out" and three.answer == "B. out"
    assert task.is_correct("(B)", three) and not task.is_correct("in", three)
    assert [q.id for q in task.questions(2)] == [3, "first"]
    bare = JsonlTask(write(line(), name="bare.jsonl"), matching="contains").questions(None)[0]
    assert (bare.id, bare.kind, bare.matching) == (1, "other", "contains")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"image": "a.png"', "no JSON"),
        ("[{}]", "without [ ]"),
        ("3", "it is no object"),
        ('{"image": "a.png", "image": "b.png"}', "'image' is there twice"),
        (line(image=None), "no 'image'"),
        (line(image="no.png"), "there is no file"),
        (line(image="my.jsonl"), "not a picture"),
        (line(image="torn.png"), "cannot be read"),
        (line(image="https://x.org/a.png"), "download it"),
        (line(image=["a.png", "b.png"]), "'image' is a list"),
        (line(question=" "), "'question' is empty"),
        (line(question="<image>\nwhy?"), "leave <image> out"),
        (line(answer=None), 'give "answer"'),
        (line(answers=["x"]), 'give "answer"'),
        (line(answer=None, answers=[]), "one or more"),
        (line(answer=True), "not a text"),
        (line(answer="?!"), "no letter or digit"),
        (line(answer=float("nan")), "not a text"),
        (line(answer="many", matching="number"), "holds no number"),
        (line(matching="numbr"), "Did you mean: number"),
        (line(matching="choice"), '"choices"'),
        (line(choices=["x"]), "2 to 26"),
        (line(choices=["x", "X"]), "the same"),
        (line(choices=["x", "y"], answer="C"), "no option: x, y (A to B)"),
        (line(choices=["B", "A"], answer="A"), "letter of one option and the text of another"),
        (line(kinds="x"), "did you mean 'kind'"),
        (line(id=[1]), "id [1]"),
        (line(id="1"), "that of line 1 already"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_line_is_named_with_its_number(write, tmp_path, bad, says):
    (tmp_path / "torn.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    with pytest.raises(DataError) as error:
        JsonlTask(write(line(), line(), bad, line()))
    head, wrong = error.value.lines
    assert head.endswith("my.jsonl: 1 line cannot be asked:")
    assert wrong.startswith("line 3: ") and says in wrong


def test_bytes_that_are_no_text_are_named(write, tmp_path):
    path = write(line())
    path.write_bytes(path.read_bytes() + b'{"image": "\xff"}\n')
    with pytest.raises(DataError, match=r"line 2: it is not UTF-8 \(byte 12\)"):
        JsonlTask(path)


def test_all_bad_lines_are_named_at_once_before_anything_heavy_is_imported(write, tmp_path):
    write(line(image="no.png"), line(), line(image="my.jsonl"), *[line(answer=3.5, id=0)] * 25)
    program = (
        "import sys; from vlmprune.eval.cli import main; code = main(sys.argv[1:]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "sweep", "--data", "my.jsonl"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 2 and done.stdout == ""
    head, first, second, *others, last = done.stderr.splitlines()
    assert head == "vlmprune sweep: error: my.jsonl: 26 lines cannot be asked:"
    assert first.startswith("  line 1: image 'no.png'")
    assert second.startswith("  line 3: 'my.jsonl' is not a picture")
    assert len(others) == 18 and others[0].startswith("  line 5: the id 0 is that of line 4")
    assert last == "  and 6 more."
    assert not (tmp_path / "vlmprune_runs").exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [("no.jsonl", "No such file"), ("empty.jsonl", "holds no questions"), (".", "cannot be read")],
)
def test_a_file_without_questions(write, tmp_path, name, says):
    write("", name="empty.jsonl")
    with pytest.raises(DataError, match=says):
        JsonlTask(tmp_path / name)


def test_two_files_of_one_name_are_refused(write, tmp_path):
    (tmp_path / "other").mkdir()
    paths = [str(write(line())), str(write(line(image="../a.png"), name="other/my.jsonl"))]
    assert len(read_all([paths[0], paths[0]])) == 1
    with pytest.raises(TaskError, match="both be called 'my'"):
        read_all(paths)


def test_the_version_covers_questions_answers_matching_and_pictures(write, tmp_path):
    def version(*lines: object, **options: object) -> str:
        return JsonlTask(write(*lines), **options).version

    seen = [
        version(line()),
        version(line(question="What?")),
        version(line(answer="a dog")),
        version(line(kind="x")),
        version(line(), matching="contains"),
        version(line(), line(id="more")),
        version(line(image="b.png")),
    ]
    assert len(set(seen)) == len(seen)
    assert version(line(source="me")) == version(line()) == seen[0]
    (tmp_path / "a.png").write_bytes((tmp_path / "b.png").read_bytes())
    assert version(line()) == seen[-1]


def test_photos_are_turned_as_the_camera_was_held(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 30)).save(tmp_path / "photo.jpg", exif=exif)
    assert read_picture(tmp_path / "photo.jpg").size == (30, 40)


# --- Sweeps ----------------------------------------------------------------------------------


TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE {% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endfor %}"
)


def place(name: str) -> str:
    """What stands for a picture in prompts of a family."""
    mark = PROCESSORS[name].MARKS["image_token"]
    return f"<|vision_start|> {mark} <|vision_end|>" if CASES[name].packed else mark


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name in WHOLE_NAMES])
def test_models_of_several_families_are_swept_in_python(name, write, tmp_path):
    case, processor = CASES[name], PROCESSORS[name].processor()
    processor.chat_template = TEMPLATE.replace("IMAGE", place(name))
    for letter, size in (("a", (40, 60)), ("b", (90, 50)), ("c", (32, 32))):
        Image.radial_gradient("L").resize(size).save(tmp_path / f"{letter}.png")
    path = write(
        line(answer="x"),
        line(image="b.png", kind="where", choices=["in", "out"], answer="A"),
        line(image="c.png", question="and now ?", answer="9"),
    )
    task = JsonlTask(path, matching="contains", max_new_tokens=3)
    asked = {q.kind: task.prompt(processor, q) for q in task.questions(None)}
    assert asked["where"].split("\n") == [
        f"{place(name)} What is it?",
        "A. in",
        "B. out",
        f"{CHOICE_INSTRUCTION} ",
    ]
    model = case.model()
    given = {"task": task, "batch_size": 2, "output_path": tmp_path / "runs"}
    dense, pruned = sweep_model(model, processor, ["divprune"], [0.5], **given)
    assert dense["status"] == pruned["status"] == "ok"
    assert main_score(dense)[1]["n"] == 3
    half = dense["tokens"]["in_per_image"] / 2
    assert pruned["tokens"]["kept_per_image"] == pytest.approx(half, abs=0.5)  # of odd counts
    assert set(main_score(dense)[1]["by_kind"]) == {"other", "where"}
    assert dense["config"]["task"] == "my" and dense["config"]["task_version"] == task.version
    (only, _), (limited, _) = (
        sweep_model(model, processor, ["divprune"], [0.5], **given, **options)
        for options in ({"kinds": ["where"]}, {"limit": 2})
    )
    assert main_score(only)[1]["n"] == 1 and main_score(limited)[1]["n"] == 2
    assert len(read_records(tmp_path / "runs")) == 6


def embedded_lines(count: int, folder: Path) -> list[dict[str, object]]:
    found = []
    for question in embedded.questions(count):
        question.image.save(folder / f"{question.id}.png")
        found.append(
            line(
                image=f"{question.id}.png",
                question=question.question,
                answer=question.answer,
                kind=question.kind,
            )
        )
    return found


def test_the_command_asks_as_the_benchmark_does_and_goes_on_where_it_stopped(
    write, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    write(*embedded_lines(7, tmp_path)[:-1], line(**embedded_lines(7, tmp_path)[-1], source="me"))
    argv = ["sweep", "--methods", "grid", "--budgets", "0.25", "--max_new_tokens", "8"]
    assert cli.main([*argv, "--data", "my.jsonl", "-s"]) == 0
    captured = capsys.readouterr()
    assert "task: my v" in captured.out and "limit: all" in captured.out
    assert "note: my.jsonl: keys that are not read: source" in captured.err
    assert "does not know" not in captured.err
    assert cli.main([*argv, "--limit", "7", "-o", "theirs"]) == 0
    own, theirs = (read_records(tmp_path / name) for name in ("vlmprune_runs", "theirs"))
    for a, b in zip(own, theirs, strict=True):
        assert a["scores"] == b["scores"] and a["tokens"] == b["tokens"]
    samples = Path("vlmprune_runs", "samples", f"{own[0]['id']}.jsonl").read_text().splitlines()
    assert [json.loads(s)["kind"] for s in samples] == sorted(
        json.loads(s)["kind"] for s in samples
    )
    capsys.readouterr()

    monkeypatch.chdir(tmp_path / "vlmprune_runs")  # its own file finds the questions from anywhere
    again = ["sweep", "--config", "sweep.yaml", "-o", "."]
    assert cli.main(again) == 0
    assert "cells: 2 already there" in capsys.readouterr().err
    assert cli.main([*again, "--kinds", "read,rel"]) == 0
    assert "kinds: read rel" in capsys.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "vlmprune_runs", "-o", "report.html"]) == 0
    assert cli.main(["report", "vlmprune_runs", "-o", "report.csv"]) == 0
    page = Path("report.html").read_text()
    assert "By kind of question" in page and "read (1)" in page
    assert ",my," in Path("report.csv").read_text()


# --- Settings --------------------------------------------------------------------------------


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """What a sweep was asked for."""
    made: list[dict] = []
    monkeypatch.setattr(sweep_command, "run", lambda request: made.append(vars(request)) or 0)
    monkeypatch.chdir(tmp_path)

    def run(*argv: str) -> dict:
        assert cli.main(["sweep", *argv]) == 0
        return made[-1]

    return run


def test_all_of_a_file_is_asked_and_nothing_else_unless_it_is_said(sweep, write):
    write(line())
    asked = sweep("--data", "my.jsonl", "--preset", "llava-1.5")
    assert asked["limit"] is None and asked["tasks"] == []
    assert [task.path for task in asked["own"]] == [Path("my.jsonl")]
    assert sweep("--data", "my.jsonl", "--limit", "500")["limit"] == 500
    assert sweep("--data", "my.jsonl", "--tasks", "tinyscenes")["tasks"] == ["tinyscenes"]
    assert sweep()["limit"] == 500 and sweep()["own"] == []
    task = sweep("--data", "my.jsonl", "--matching", "contains", "--max_new_tokens", "9")["own"][0]
    assert task.max_new_tokens == 9 and task.questions(1)[0].matching == "contains"


def test_a_settings_file_names_questions_relative_to_itself(sweep, write, tmp_path):
    write(line())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.yaml").write_text(
        yaml.safe_dump({"data": "../my.jsonl", "matching": "contains", "preset": "llava-1.5"})
    )
    asked = sweep("--config", "sub/mine.yaml", "-o", "deep/runs")
    assert asked["limit"] is None and asked["tasks"] == [] and len(asked["own"]) == 1
    assert asked["own"][0].questions(1)[0].matching == "contains"
    assert asked["settings"]["data"] == ["../../my.jsonl"]
    (tmp_path / "deep" / "runs").mkdir(parents=True)
    config.write_config(tmp_path / "deep" / "runs", asked["settings"])
    again = sweep("--config", "deep/runs/sweep.yaml")
    assert again["settings"] == asked["settings"]


def test_the_command_line_knows_all_matchings(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--matching", "fuzzy"])
    said = capsys.readouterr().err
    assert re.findall("exact|contains|number|choice", said.partition("choose from")[2]) == list(
        MATCHINGS
    )


def test_words_that_the_model_does_not_know_are_said(write, capsys):
    task = JsonlTask(write(line(question="what color is the hat ?")))
    _, processor = embedded.load_model()
    sweep_command._say_what_is_lost([task], processor)
    assert "my.jsonl: the model does not know 'hat'," in capsys.readouterr().err
