"""On the command line errors say which flags to type, not which keyword arguments."""

import pytest
from vlmprune.eval.cli import main
from vlmprune.eval.words.flags import in_flags

pytestmark = pytest.mark.usefixtures("timed_once")

PYTHON_WORDS = ("clip=", "ClipText", "keep_ratio=", "flops_ratio=", "='", '="', "vlmprune.")


@pytest.mark.parametrize(
    ("said", "in_ask", "in_sweep"),
    [
        (
            "pass one of keep_ratio=0.25, keep_tokens=64 or flops_ratio=0.3.",
            "pass one of --keep_ratio 0.25, --keep_tokens 64 or --flops_ratio 0.3.",
            "pass one of --budgets 0.25, --budgets 64 or --budgets flops:0.3.",
        ),
        (
            "Give keep_ratio or keep_tokens.",
            "Give --keep_ratio or --keep_tokens.",
            "Give a ratio (0.25) or a number of tokens (64).",
        ),
        (
            "fastv(average_tokens=50) cannot be reached: the nearest is average_tokens=66.",
            "fastv(average_tokens=50) cannot be reached: the nearest is --average_tokens 66.",
            "fastv(average_tokens=50) cannot be reached: the nearest is --budgets avg:66.",
        ),
        (
            'pass clip=vlmprune.ClipText.from_pretrained("openai/clip", processor).',
            "pass --clip openai/clip.",
            "pass --clip openai/clip.",
        ),
        (
            "newlines='compete' is not possible: use scope=\"image\" or official=True.",
            ":newlines=compete is not possible: use :scope=image or :official=True.",
            ":newlines=compete is not possible: use :scope=image or :official=True.",
        ),
        (
            'positions="repacked" has no meaning: leave positions out or use "original".',
            '--positions repacked has no meaning: leave --positions out or use "original".',
            '--positions repacked has no meaning: leave --positions out or use "original".',
        ),
        ("keep ratios of 0.5 as they are", "keep ratios of 0.5 as they are", None),
    ],
)
def test_keyword_arguments_become_flags(said, in_ask, in_sweep):
    assert in_flags(said, budget_flags=True) == in_ask
    assert in_flags(said) == (said if in_sweep is None else in_sweep)


@pytest.mark.parametrize(
    "command",
    [
        ["ask", "embedded:3", "--method", "elastic_cache", "--average_tokens", "50"],
        ["ask", "embedded:3", "--method", "cdpruner", "--keep_ratio", "0.2"],
        ["ask", "embedded:3", "--method", "cls_topk:newlines=compete", "--keep_ratio", "0.2"],
        ["ask", "embedded:3", "--method", "fastv", "--keep_ratio", "2"],
        ["compare", "embedded:3", "--methods", "cdpruner", "--keep_ratio", "0.2"],
        ["sweep", "--methods", "cls_topk:newlines=compete", "--limit", "7"],
        ["sweep", "--methods", "grid", "fastv", "--budgets", "published"],
    ],
    ids=lambda command: "-".join(command[::2]),
)
def test_errors_of_commands_speak_of_flags(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "error: " in said
    assert [word for word in PYTHON_WORDS if word in said] == []


def test_reasons_of_a_sweep_speak_of_flags(capsys, tmp_path):
    options = ["--budgets", "avg:50", "--limit", "7", "-o", str(tmp_path)]
    assert main(["sweep", "--methods", "elastic_cache", "cdpruner", *options]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "not applicable: " in line]
    assert len(lines) == 2
    assert "Give a ratio (0.25)" in lines[0] and "pass --clip openai/" in lines[1]


def test_a_sweep_leaves_no_method_out(capsys, tmp_path):
    options = ["--methods", "pyramiddrop", "grid", "--budgets", "published", "-o", str(tmp_path)]
    assert main(["sweep", *options]) == 2
    assert "grid needs a budget: give one of --budgets 0.25" in capsys.readouterr().err
