"""The one list of skips: every skip of a test names a reason of it, and no reason is idle."""

import ast
from pathlib import Path

import pytest
from kit.paths import TESTS
from kit.skips import REASONS, skips_table

SKIPS = TESTS / "kit" / "skips.py"
WAYS = {"skip", "skipif", "skipIf", "skipUnless", "SkipTest", "importorskip", "xfail"}
OURS = {"needs", "why", "skip"}
FILES = sorted(path for path in TESTS.rglob("*.py") if path != SKIPS)


def of_the_list(node: ast.AST, *names: str) -> bool:
    """Whether it is a call of `skips.<one of the names>`."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(id="skips"), attr=called)):
            return called in names
    return False


def own_skips(text: str) -> list[int]:
    """Lines that skip a test past the list."""
    nodes = list(ast.walk(ast.parse(text)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    fine = {id(call.func) for call in calls if of_the_list(call, *OURS)}
    for call in calls:
        if any(word.arg == "reason" and of_the_list(word.value, "why") for word in call.keywords):
            fine.add(id(call.func))
    lines = []
    for node in nodes:
        if isinstance(node, ast.Attribute) and node.attr in WAYS and id(node) not in fine:
            lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom):
            lines += [node.lineno for alias in node.names if alias.name in WAYS]
    return lines


def reasons(path: Path) -> set[str]:
    """The reasons that a file names."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.args[0].value for node in nodes if of_the_list(node, *OURS)}


def test_every_skip_is_in_the_list():
    found = {str(path.relative_to(TESTS)): own_skips(path.read_text()) for path in FILES}
    assert not {path: lines for path, lines in found.items() if lines}, "skip by kit/skips.py"


@pytest.mark.parametrize(
    "line",
    [
        "pytest.skip('no')",
        "@pytest.mark.skipif(True, reason='no')\ndef f(): ...",
        "pytest.importorskip('timm')",
        "pytest.param(1, marks=pytest.mark.xfail)",
        "from pytest import skip",
        "self.skip()",
    ],
)
def test_other_skips_are_seen(line):
    assert own_skips(line) == [1]


def test_every_reason_is_used_and_known():
    assert set().union(*map(reasons, FILES)) == set(REASONS)


def test_the_table_says_every_reason():
    rows = skips_table().splitlines()[2:]
    assert [row.split(" | ") for row in rows] == [
        [f"| {reason.why}", f"{reason.where} |"] for reason in REASONS.values()
    ]
