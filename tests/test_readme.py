"""The Markdown files: tables up to date, links that lead somewhere, commands and code that work.

`python tests/test_readme.py --write` renews all generated tables. Code under `<!-- tried -->` is
run here as it stands: commands from an empty folder, Python beside the embedded model.
"""

from __future__ import annotations

import ast
import pkgutil
import re
import shlex
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import vlmprune
import yaml
from kit import error_page, skips
from kit.forked import exit_code, forked
from kit.installed import install
from kit.markdown import Fence, Page, pages
from kit.paths import ROOT, TESTS
from kit.tables import GENERATED
from vlmprune.eval import cli, embedded

PAGES = pages()
EACH = pytest.mark.parametrize("page", PAGES, ids=str)
MOST_BYTES = 8192  # of the front page: what one reads in a minute
WIDTH = 100


# --- What they say ---------------------------------------------------------------------------


def test_every_room_has_a_page_at_its_door():
    rooms = ("prune", "adapters", "eval", "eval/embedded/results", "tests", "notebooks")
    missing = [room for room in rooms if not (ROOT / room / "README.md").exists()]
    assert not missing


def test_the_front_page_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= MOST_BYTES


@EACH
def test_lines_of_prose_are_short(page):
    """But for a picture or a link alone on its line, which cannot be broken."""
    long = [
        f"{page}:{number}: {len(line)}"
        for number, line in page.prose()
        if len(line) > WIDTH and not (line.startswith(("![", "[")) and line.endswith(")"))
    ]
    assert not long


@pytest.mark.parametrize("name", GENERATED)
def test_the_table_is_up_to_date(name):
    (found,) = [page.tables[name] for page in PAGES if name in page.tables]
    assert found == GENERATED[name]().strip(), "stale: run python tests/test_readme.py --write"


@EACH
def test_its_links_lead_somewhere(page):
    dead = []
    for target in page.links:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        there = (page.path.parent / path).resolve() if path else page.path
        if not there.exists() or (anchor and anchor not in Page(there).anchors):
            dead.append(target)
    assert not dead


@EACH
def test_the_files_that_it_names_exist(page):
    """From the root of the repository, or the page's own folder; NAME is any."""
    missing = [
        path
        for path in page.paths
        if not any(list(base.glob(path.replace("NAME", "*"))) for base in (ROOT, page.path.parent))
    ]
    assert not missing


@EACH
def test_the_tests_that_it_names_exist(page):
    there = "".join(path.read_text() for path in TESTS.rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page.unfenced))
    assert not [name for name in named if f"def {name}(" not in there]


GROUPS = {"vlmprune.methods", "vlmprune.families", "vlmprune.eval_families"}
"""Entry points, which are no modules."""


@EACH
def test_the_names_that_it_says_can_be_imported(page):
    """Those of the prose, and in tables of what has moved those on the right."""
    lines = [line for _, line in page.prose()]
    lines += [line.split("|")[2] for line in page.text.splitlines() if re.match(r"\| `vlmp", line)]
    found = set(re.findall(r"`(vlmprune(?:\.\w+)+)(?=[`(])", "\n".join(lines))) - GROUPS
    for name in found:
        pkgutil.resolve_name(name)


# --- What they tell to type ------------------------------------------------------------------


def code(kind: str) -> list[object]:
    """All code of one language, for parametrize."""
    return [
        pytest.param(page, fence, id=f"{page}:{fence.line}")
        for page in PAGES
        for fence in page.fences
        if fence.kind == kind
    ]


def commands(text: str) -> list[list[str]]:
    """The words of every command in a block."""
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize(("page", "fence"), code("bash"))
def test_the_options_of_its_commands_are_known(page: Page, fence: Fence):
    """Of ours; nothing is run."""
    for words in commands(fence.code):
        for argv in _ours(words):
            cli.build_parser().parse_args(argv)


def _ours(words: list[str]) -> list[list[str]]:
    """The arguments of each `vlmprune` between `&&`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == "&&":
            parts.append([])
        else:
            parts[-1].append(word)
    return [p[1:] for p in parts if p and Path(p[0]).name == "vlmprune"]


@pytest.mark.parametrize(("page", "fence"), code("python"))
def test_what_it_imports_is_there(page: Page, fence: Fence):
    for node in ast.walk(ast.parse(fence.code)):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            if getattr(node, "module", None) == "vllm" and not find_spec("vllm"):
                continue  # it lives in an environment of its own
            exec(compile(ast.Module([node], []), str(page), "exec"), {})


def tried(kind: str) -> list[object]:
    return [p for p in code(kind) if p.values[1].mark == "tried"]


@pytest.mark.usefixtures("timed_once")
@pytest.mark.parametrize(("page", "fence"), tried("bash"))
def test_its_commands_work(page: Page, fence: Fence, tmp_path, monkeypatch, forget_methods):
    monkeypatch.chdir(tmp_path)
    for words in commands(fence.code):
        assert words[0] == "vlmprune", words
        assert cli.main(words[1:]) == 0, words


@pytest.fixture(scope="module")
def loaded():
    return embedded.load_model()


@pytest.mark.usefixtures("timed_once")
@pytest.mark.parametrize(("page", "fence"), tried("python"))
def test_its_code_works(page: Page, fence: Fence, tmp_path, monkeypatch, loaded):
    """Beside a model, its processor, a question's inputs and picture."""
    monkeypatch.chdir(tmp_path)
    model, processor = loaded
    question = embedded.questions(1)[0]
    question.image.save("cat.jpg")
    text = embedded.prompt(processor, question.question)
    names = {
        "vlmprune": vlmprune,
        "model": model,
        "processor": processor,
        "image": question.image,
        "inputs": processor(images=question.image, text=text, return_tensors="pt"),
    }
    try:
        exec(compile(fence.code, str(page), "exec"), names)
    finally:
        vlmprune.unpatch(model)


@pytest.fixture
def forget_methods():
    """Methods that the test registered are gone afterwards."""
    from vlmprune.prune import registry, shipped

    modules = set(sys.modules)
    shipped.shipped.cache_clear()
    yield
    for name in ("mine", "norm"):
        registry._classes.pop(name, None)
    for name in set(sys.modules) - modules:
        if name.rpartition(".")[2] in ("mine", "norm"):
            del sys.modules[name]
    shipped.shipped.cache_clear()


def test_the_added_method_works(tmp_path, monkeypatch, forget_methods):
    """The example file, put where the page says, is found, listed and runs."""
    import torch
    from kit import zoo
    from vlmprune.prune import shipped
    from vlmprune.prune.methods import before_llm

    (source,) = [f.code for p in PAGES for f in p.fences if f.mark == "tried: norm.py"]
    (tmp_path / "norm.py").write_text(source)
    monkeypatch.setattr(before_llm, "__path__", [*before_llm.__path__, str(tmp_path)])
    shipped.shipped.cache_clear()
    assert "norm" in vlmprune.methods()
    case = zoo.CASES["llava-clip-llama"]
    model = case.model()
    with torch.no_grad(), vlmprune.patch(model, "norm", keep_ratio=0.25, order=1.0) as handle:
        model(**case.inputs())
    assert handle.last.tokens_kept == [case.num_tokens("C") // 4]


@pytest.fixture
def installed(tmp_path):
    """What is printed where a package is installed, whose entry points are those of a page."""
    from vlmprune import adapters, prune
    from vlmprune.eval import models

    def run(room: str, code: str) -> str:
        (page,) = [p for p in PAGES if str(p) == f"{room}/README.md"]
        (shown,) = [f.code for f in page.fences if f.mark == "tried: installed"]
        install(tmp_path, "my_package", tomllib.loads(shown)["project"]["entry-points"])

        def beside_it() -> None:
            sys.path.insert(0, str(tmp_path))
            for registry in (prune.registry, adapters.registry, models.registry):
                registry._plugins.cache_clear()
            models.registry.known_families.cache_clear()
            exec(code, {})

        done = exit_code(forked(beside_it, tmp_path / "said.txt"))
        said = (tmp_path / "said.txt").read_text()
        assert done == 0, said
        return said

    (tmp_path / "my_package").mkdir()
    return run


@skips.needs("fork")
def test_the_method_of_an_installed_package_works(installed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "my_package")
    assert cli.main(["new-method", "mine", "--place", "before_llm"]) == 0
    said = installed("prune", "import vlmprune; print(vlmprune.method('mine', keep_ratio=0.5))")
    assert said == "mine(keep_ratio=0.5)\n"


@skips.needs("fork")
def test_the_family_of_an_installed_package_works(installed, tmp_path):
    for name in ("theirs.py", "their_eval.py"):
        (source,) = [f.code for p in PAGES for f in p.fences if f.mark == f"tried: {name}"]
        (tmp_path / "my_package" / name).write_text(source)
    code = (
        "from vlmprune.adapters.registry import family_class\n"
        "from vlmprune.eval.models.registry import known_family\n"
        "print(family_class('theirs').__name__, known_family('theirs').line)"
    )
    assert installed("adapters", code) == "Theirs Their LLaVA\n"


def test_the_page_of_families_has_all_that_a_family_must_say():
    from vlmprune.adapters.family import Family

    said = (ROOT / "adapters" / "README.md").read_text()
    assert not [name for name in Family.__abstractmethods__ if f"`{name}`" not in said]


# --- Errors and the citation -----------------------------------------------------------------


def test_the_page_of_errors_has_every_error_of_the_front_door():
    front = {name for name in vlmprune.__all__ if name.endswith("Error")} - {"VlmpruneError"}
    names = [error.__name__ for error in error_page.errors()]
    assert set(names[: len(front)]) == front == set(error_page.EXAMPLES)
    assert {name.lower() for name in names} <= Page(ROOT / "ERRORS.md").anchors


@pytest.mark.parametrize("error", error_page.errors(), ids=lambda error: error.__name__)
def test_an_error_says_its_symptom_cause_what_to_type_and_its_page(error):
    said = error_page.parts(error)
    assert list(said) == ["", *error_page.PARTS] and all(said.values())
    assert said["Page"] == f"ERRORS.md#{error.__name__.lower()}"


def test_the_page_of_errors_is_in_the_wheel():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert "ERRORS.md" in tools["package-data"]["vlmprune"]


def test_the_citation_is_of_this_version():
    said = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert said["cff-version"] == "1.2.0" and said["type"] == "software"
    assert said["message"] and said["authors"]
    assert said["title"] == project["name"]
    assert said["version"] == project["version"] == vlmprune.__version__
    assert said["license"] == project["license"]


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit("usage: python tests/test_readme.py --write")
    made = {name: table() for name, table in GENERATED.items()}
    for page in PAGES:
        page.path.write_text(page.with_tables(made), encoding="utf-8")
