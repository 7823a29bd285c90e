"""The notebooks as they are stored: outputs of a whole run, without errors, and small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_BYTES = 150_000
ALL = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def test_there_are_numbered_notebooks_and_a_paragraph_on_each():
    assert [path.stem.partition("_")[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"\]\((\S+\.ipynb)\)", readme) == [path.name for path in NOTEBOOKS]


@ALL
def test_it_is_small(path):
    assert path.stat().st_size < MOST_BYTES


@ALL
def test_it_was_run_from_top_to_bottom_without_errors(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert outputs and all(output["output_type"] != "error" for output in outputs)
    assert any(set(output.get("data", {})) - {"text/plain"} for output in outputs)
    warned = [o for o in outputs if o.get("name") == "stderr"]
    assert not warned, "something was written to stderr"


@ALL
def test_it_names_no_folder_of_the_machine_that_ran_it(path):
    assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8"))


@ALL
def test_it_measures_with_library_functions_only(path):
    """Classes and functions of a notebook are methods, or ask and show; none measures."""
    source = "\n".join("".join(cell["source"]) for cell in cells(path))
    assert "vlmprune" in source
    assert not re.search(r"^\s*(import|from) time|perf_counter|register_forward", source, re.M)
