"""The tests themselves, held by parsing them: no test imports a test, and the tree mirrors the
house.

Every check is a function from paths and sources to offences; the checks are checked as well.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath

import pytest
from kit.paths import ROOT, TESTS

SOURCES = {p.relative_to(TESTS).as_posix(): p.read_text() for p in sorted(TESTS.rglob("*.py"))}
ROOMS = {"prune", "adapters", "eval"}
"""Folders whose tests are in the folder of the same name."""
AT_THE_TOP = {
    f"test_{topic}.py" for topic in ("imports", "notebooks", "readme", "server", "skips", "tests")
}
"""What is about all rooms at once, or about none."""
SHARED = {"kit", "families"}
"""Folders of what tests share: helpers, and what they need of each model family."""


# --- No test imports a test ------------------------------------------------------------------


def imported(text: str) -> Iterator[str]:
    """The dotted name of each import, with each name that `from` brings in."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def imported_tests(text: str) -> list[str]:
    """Imports of test modules. A function of `kit` may be called test_..., a module may not."""
    found = []
    for name in imported(text):
        module = name.split(".")[:-1] if name.startswith("kit.") else name.split(".")
        found += [name] * any(part.startswith("test_") for part in module)
    return found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from test_sweep import cells", ["test_sweep.cells"]),
        ("def f():\n    import test_sweep as s", ["test_sweep"]),
        ("from tests.eval import test_sweep", ["tests.eval.test_sweep"]),
        ("from . import test_sweep", [".test_sweep"]),
        ("from kit.test_cells import cells", ["kit.test_cells.cells"]),
        ("import kit.cells, testing\nfrom kit import cells", []),
    ],
)
def test_an_imported_test_is_found(text, found):
    assert imported_tests(text) == found


def test_no_test_is_imported():
    """What two tests need is in `kit`."""
    offences = {path: found for path, text in SOURCES.items() if (found := imported_tests(text))}
    assert not offences


# --- The tree mirrors the house --------------------------------------------------------------


def misplaced(paths: Collection[str], folders: Collection[str]) -> list[str]:
    """Files that are in no room of the house, whose folders are given, nor beside the rooms."""
    found = []
    for path in paths:
        folder, name = PurePosixPath(path).parent.as_posix(), PurePosixPath(path).name
        if folder == ".":
            right = name in AT_THE_TOP | {"conftest.py"}
        elif folder in SHARED:
            right = not name.startswith("test_")
        else:
            right = folder in folders and name.startswith("test_")
        found += [path] * (not right)
    return found


def same_names(paths: Collection[str]) -> Mapping[str, list[str]]:
    """Names of files that stand in several folders: a test is found by its name alone."""
    by_name: dict[str, list[str]] = {}
    for path in paths:
        by_name.setdefault(PurePosixPath(path).name, []).append(path)
    return {name: where for name, where in by_name.items() if len(where) > 1}


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("test_readme.py", True),
        ("conftest.py", True),
        ("test_sweep.py", False),
        ("zoo.py", False),
        ("prune/test_select.py", True),
        ("prune/methods/test_golden.py", True),
        ("prune/zoo.py", False),
        ("prune/attic/test_golden.py", False),
        ("attic/test_golden.py", False),
        ("kit/zoo.py", True),
        ("families/llava.py", True),
        ("kit/test_zoo.py", False),
        ("kit/animals/zoo.py", False),
    ],
)
def test_a_misplaced_file_is_found(path, right):
    assert (misplaced([path], {"prune", "prune/methods"}) == []) == right


def test_files_of_one_name_are_found():
    assert same_names(["a/test_x.py", "test_y.py"]) == {}
    assert same_names(["a/test_x.py", "test_x.py"]) == {"test_x.py": ["a/test_x.py", "test_x.py"]}


def test_the_tree_mirrors_the_house():
    folders = {
        folder.relative_to(ROOT).as_posix()
        for room in ROOMS
        for folder in [ROOT / room, *(ROOT / room).rglob("*")]
        if folder.is_dir() and any(folder.glob("*.py"))
    }
    assert not misplaced(SOURCES, folders)
    assert not same_names(SOURCES)


def test_beside_the_rooms_are_what_they_share():
    """Helpers, stored expectations, and outputs of official code."""
    folders = {p.name for p in TESTS.iterdir() if p.is_dir() and not p.name.startswith(("_", "."))}
    assert folders == ROOMS | SHARED | {"data", "golden"}
