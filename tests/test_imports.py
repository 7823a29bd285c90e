"""The two rules of the design, held by parsing the folders: a method never knows a model, an
adapter never knows a method. And what else can be read from the sources alone.

Every check is a function from a module's source to its offences; the checks are checked as well.
"""

import ast
import os
import re
import sys
import tomllib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from vlmprune.prune.registry import method_names

ROOT = Path(__file__).parent.parent
NOT_PACKAGED = {"tests", "notebooks", "build", "dist"}
LAYERS = ("prune", "adapters", "eval")
MAY_IMPORT = {"prune": {"prune"}, "adapters": {"prune", "adapters"}, "eval": set(LAYERS)}
PRUNE_MAY_IMPORT = sys.stdlib_module_names | {"torch", "triton", "einops"}
ROOMS = {
    "prune": (
        *(
            "__init__",
            "errors",
            "numbers",
            "amount",
            "tiling",
            "sight",
            "plugins",
            "shipped",
            "ops",
        ),
        *("contract", "declared", "budget", "registry", "answers", "reductions", "thinned"),
        *("joining", "tiles", "select", "fields", "layers", "schedule", "blocks", "salience"),
        *("presses", "batches", "methods", "choose", "scores", "local_values"),
    ),
    "adapters": (
        *("__init__", "cache_names", "devices", "wrappers", "stopwatch", "hooks"),
        *("tap", "core_mlp", "clip_text", "layer_names", "both_ways", "modality", "sequence"),
        *("encoder", "image_model", "encoders", "image_models"),
        *("family", "merged", "any_size", "tiled", "families", "registry"),
        *("signals", "patch_setup", "budgets", "encoded", "remember"),
        *("cache", "report", "reporting", "pictures", "checks", "places", "generation"),
        *("prepare", "installed", "engine", "standalone", "handle", "patching", "serving"),
    ),
    "eval": (
        "__init__",
        *("console", "processes", "environment", "extras", "table"),
        *("importing", "image_file", "vocabulary_note", "content_hash", "sources"),
        *("words", "method_facts", "transcriptions"),
        *("tasks", "embedded", "models", "presets", "results", "measure"),
        *("sweep", "classify", "compare", "bench", "report", "tune", "lmms", "checking"),
        *("in_process", "arguments", "commands", "cli"),
    ),
}
"""The files and folders of a layer, lowest first: none imports one that stands behind it."""


def sources(layer: str) -> dict[str, str]:
    """Path relative to the root -> source of the layer's modules."""
    paths = sorted((ROOT / layer).rglob("*.py"))
    return {path.relative_to(ROOT).as_posix(): path.read_text() for path in paths}


MODULES = {layer: sources(layer) for layer in LAYERS}
FILES = {path: text for layer in LAYERS for path, text in MODULES[layer].items()}
FILES |= {path.name: path.read_text() for path in ROOT.glob("*.py")}
METHOD_FILES = {
    path: text
    for path, text in MODULES["prune"].items()
    if path.startswith("prune/methods/") and not path.endswith("__init__.py")
}
FAMILIES = {
    re.match(r"[a-z]+", Path(path).stem)[0]
    for path in MODULES["adapters"]
    if path.startswith("adapters/families/") and not path.endswith("__init__.py")
} - {"video"}  # of video_llava, which its second word tells


# --- Reading a source ------------------------------------------------------------------------


def imports(path: str, text: str) -> Iterator[tuple[bool, str]]:
    """(inside the package?, dotted name) of each import, with each name that `from` brings in."""
    folder = path.split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((False, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = node.level > 0
            base = folder[: len(folder) - node.level + 1] if inside else []
            base = base + (node.module.split(".") if node.module else [])
            yield from ((inside, ".".join([*base, alias.name])) for alias in node.names)


def nodes(text: str) -> Iterator[ast.AST]:
    """The syntax tree without docstrings; comments are not in it anyway."""
    everything = list(ast.walk(ast.parse(text)))
    docs = {
        id(node.value)
        for node in everything
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return (node for node in everything if id(node) not in docs)


def words(text: str) -> Iterator[str]:
    """Every identifier and string constant."""
    for node in nodes(text):
        yield from (value for _, value in ast.iter_fields(node) if isinstance(value, str))


def constants(text: str) -> set[str]:
    values = (node.value for node in nodes(text) if isinstance(node, ast.Constant))
    return {value for value in values if isinstance(value, str)}


def absolute_self_imports(path: str, text: str) -> list[str]:
    own = {*LAYERS, "vlmprune"}
    names = [name for inside, name in imports(path, text) if not inside]
    return [name for name in names if name.split(".")[0] in own]


def wrong_direction(path: str, text: str) -> list[str]:
    allowed = MAY_IMPORT[path.split("/")[0]]
    inside = [name for is_inside, name in imports(path, text) if is_inside]
    return [name for name in inside if (top := name.split(".")[0]) in LAYERS and top not in allowed]


def targets(path: str, text: str, files: Collection[str]) -> set[str]:
    """The files of the package that one imports, wherever in it: in a function, for types alone."""
    found = set()
    for inside, name in imports(path, text):
        if inside:
            module, owner = name.split("."), name.split(".")[:-1]  # or a name in the owner
            named = ("/".join([*parts, "__init__.py"]) for parts in (module, owner))
            plain = ("/".join(parts) + ".py" for parts in (module, owner))
            candidates = (file for pair in zip(plain, named, strict=True) for file in pair)
            found |= {next((file for file in candidates if file in files), path)}
    return found - {path}


def room(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


def arrows_up(path: str, text: str, files: Collection[str], order: Sequence[str]) -> list[str]:
    layer = path.split("/")[0]
    inside = [file for file in targets(path, text, files) if file.split("/")[0] == layer]
    return sorted(file for file in inside if order.index(room(file)) > order.index(room(path)))


def circles(texts: Mapping[str, str]) -> set[str]:
    """The files that can be come back to along imports."""
    arrows = {path: targets(path, text, texts) for path, text in texts.items()}
    found = set()
    for start in texts:
        seen, ahead = set(), [start]
        while ahead:
            fresh = arrows[ahead.pop()] - seen
            seen |= fresh
            ahead += fresh
        found |= {start} & seen
    return found


def foreign_to_prune(path: str, text: str) -> list[str]:
    names = [name for inside, name in imports(path, text) if not inside]
    return [name for name in names if name.split(".")[0] not in PRUNE_MAY_IMPORT]


def foreign_to_operations(path: str, text: str) -> list[str]:
    """Operations are on tensors: of the package they know each other, and how an image lies."""
    inside = [name for is_inside, name in imports(path, text) if is_inside]
    return [name for name in inside if not name.startswith(("prune.ops.", "prune.tiling."))]


def model_names_in(path: str, text: str) -> list[str]:
    found = {w: w.lower().replace("lmms", "") for w in [path, *words(text)]}  # MissinGLMmsError
    return [w for w, told in found.items() if any(family in told for family in FAMILIES)]


def method_modules_in(path: str, text: str) -> list[str]:
    inside = [name for is_inside, name in imports(path, text) if is_inside]
    return [name for name in [*inside, *words(text)] if re.search(r"\bprune\.methods\b", name)]


def method_names_in(text: str) -> set[str]:
    return constants(text) & set(method_names())


# --- The rules -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_point_one_way(layer):
    for path, text in MODULES[layer].items():
        assert wrong_direction(path, text) == [], path


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_inside_the_package_are_relative(layer):
    for path, text in MODULES[layer].items():
        assert absolute_self_imports(path, text) == [], path


@pytest.mark.parametrize("layer", ROOMS)
def test_no_room_imports_a_higher_one(layer):
    assert {room(path) for path in MODULES[layer]} == set(ROOMS[layer])
    for path, text in MODULES[layer].items():
        assert arrows_up(path, text, FILES, ROOMS[layer]) == [], path


def test_no_files_import_each_other_in_a_circle():
    assert circles(FILES) == set()


def test_prune_stands_on_torch_alone():
    for path, text in MODULES["prune"].items():
        assert foreign_to_prune(path, text) == [], path


def test_operations_know_tensors_alone():
    files = {path: text for path, text in MODULES["prune"].items() if "/ops/" in path}
    assert files and [name for one in files.items() for name in foreign_to_operations(*one)] == []
    assert foreign_to_operations("prune/ops/x.py", "from ..contract import Keys")
    assert not foreign_to_operations("prune/ops/x.py", "from .topk import top_k")


def test_a_method_never_knows_a_model():
    for path, text in MODULES["prune"].items():
        assert model_names_in(path, text) == [], path


_KNOW_FAMILIES = (
    r"/families/|^eval/embedded/|^eval/arguments/|^adapters/serving/(llava|sizes|arguments)\.py"
)


@pytest.mark.parametrize("layer", ["adapters", "eval"])
def test_nobody_outside_a_family_s_files_knows_its_name(layer):
    """But for examples in help texts, the embedded model, which is of one, a library that is
    called after its first users, and files that name classes of another engine."""
    for path, text in MODULES[layer].items():
        if not re.search(_KNOW_FAMILIES, path):
            found = {*model_names_in(path, text)} - {"qwen_vl_utils"}
            assert found == set(), path


def test_the_kit_of_the_tests_asks_a_family_s_file_too():
    """But for what says which models are asked, and what is made of one model's real parts."""
    choosing = {"zoo.py", "selections.py"}
    of_some = {"tiny_llava.py", "tiny_qwen.py", "tiny_tiled.py", "tiny_internvl.py", "lmms.py"}
    knowing = {
        path.name
        for path in (ROOT / "tests/kit").glob("*.py")
        if model_names_in(path.name, path.read_text())
    }
    assert knowing == choosing | of_some


def test_timm_is_found_and_never_imported():
    """Its extra brings it; of a model that is loaded the class and the module tell enough. Only
    what loads classifiers by name needs it."""

    def imported(path: str, text: str) -> bool:
        return any(name.partition(".")[0] == "timm" for _, name in imports(path, text))

    found = [path for path, text in FILES.items() if imported(path, text)]
    assert found == ["eval/classify/classifier.py"]
    assert imported("adapters/x.py", "from timm.layers import Attention")


def test_an_adapter_never_knows_a_method():
    for path, text in MODULES["adapters"].items():
        assert method_modules_in(path, text) == [], path
        assert method_names_in(text) == set(), path


def test_images_are_cut_and_grouped_in_one_place():
    """What calls a function of that name; operations know numbers of tiles, not what is in one."""
    for name, allowed in (
        ("tile_patches", {"prune/tiles.py", "prune/ops/parts.py"}),
        ("alike", {"prune/batches.py"}),
    ):
        calls = {
            path
            for path, text in MODULES["prune"].items()
            for node in nodes(text)
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == name
        }
        assert calls == allowed


def test_a_family_is_three_files_of_one_name():
    folders = ("adapters/families", "eval/models/families", "tests/families")
    names = [{p.stem for p in (ROOT / folder).glob("*.py")} - {"__init__"} for folder in folders]
    assert names[0] == names[1] == names[2]


def test_the_parsed_tree_is_the_real_one():
    assert len(METHOD_FILES) >= 28
    assert {Path(path).stem for path in METHOD_FILES} <= set(method_names())
    assert {"llava", "qwen"} <= FAMILIES


# --- The checks themselves -------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "import vlmprune",
        "import prune.ops",
        "from vlmprune.prune import budget",
        "from adapters import cache",
        "def f():\n    from eval.flops import x",
    ],
)
def test_absolute_self_imports_are_seen(line):
    assert absolute_self_imports("eval/measure/flops.py", line)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("prune/budget.py", "from ..adapters import cache"),
        ("prune/ops/topk.py", "from ...adapters.cache import Cache"),
        ("prune/methods/decoder/fastv.py", "from ....eval import flops"),
        ("prune/budget.py", "from .. import eval"),
        ("adapters/hooks.py", "from ..eval.flops import x"),
        ("adapters/families/x.py", "if 1:\n    from ... import eval"),
    ],
)
def test_wrong_directions_are_seen(path, line):
    assert wrong_direction(path, line)


def test_right_directions_are_not():
    assert not wrong_direction(
        "eval/x.py", "from ..adapters import a\nfrom ..prune.methods import b"
    )
    assert not wrong_direction("adapters/families/x.py", "from ...prune.contract import Tower")
    assert not wrong_direction("prune/ops/x.py", "from ..eval_words import y")
    assert not foreign_to_prune("prune/x.py", "import math, torch\nfrom einops import rearrange")


HOUSE = ("eval/words.py", "eval/sweep/__init__.py", "eval/sweep/grid.py", "eval/cli.py")


@pytest.mark.parametrize(
    ("path", "line", "file"),
    [
        ("eval/words.py", "from .cli import main", "eval/cli.py"),
        ("eval/words.py", "from . import cli", "eval/cli.py"),
        ("eval/words.py", "def f():\n    from .cli import main", "eval/cli.py"),
        ("eval/words.py", "if TYPE_CHECKING:\n    from .cli import x", "eval/cli.py"),
        ("eval/words.py", "from .sweep import Cell", "eval/sweep/__init__.py"),
        ("eval/sweep/grid.py", "from .. import cli", "eval/cli.py"),
        ("eval/sweep/grid.py", "from ..cli import main", "eval/cli.py"),
    ],
)
def test_arrows_up_are_seen(path, line, file):
    assert arrows_up(path, line, HOUSE, ("words", "sweep", "cli")) == [file]


def test_arrows_down_are_none():
    order = ("words", "sweep", "cli")
    assert not arrows_up("eval/cli.py", "from .sweep.grid import run\nimport cli", HOUSE, order)
    assert not arrows_up(
        "eval/sweep/grid.py", "from . import x\nfrom ..words import y", HOUSE, order
    )
    assert not arrows_up("eval/words.py", "from ..prune import cli", HOUSE, order)


def test_circles_are_seen():
    house = {"eval/a.py": "from .b import f", "eval/b.py": "def g():\n    from . import c"}
    assert circles(house | {"eval/c.py": "from ..prune import x"}) == set()
    house["eval/c.py"] = "if TYPE_CHECKING:\n    from .a import h"
    assert circles(house | {"eval/d.py": "from . import a"}) == set(house)


@pytest.mark.parametrize(
    "line", ["import transformers", "from timm.models import x", "import numpy"]
)
def test_foreign_imports_are_seen(line):
    assert foreign_to_prune("prune/x.py", line)


@pytest.mark.parametrize(
    "line",
    [
        "is_llava = 1",
        "x.qwen_grid",
        "def f(llava): ...",
        "class Qwen2Rule: ...",
        "f(qwen=1)",
        "x = 'LlavaForConditionalGeneration'",
        "x = f'{y} llava'",
        "import x as llava",
    ],
)
def test_model_names_are_seen(line):
    assert model_names_in("prune/x.py", line)


def test_model_names_in_prose_are_not():
    assert not model_names_in("prune/x.py", '"""LLaVA."""\nx = 1  # Qwen\n"""As in LLaVA."""')
    assert model_names_in("prune/methods/llava.py", "")


@pytest.mark.parametrize(
    "line",
    [
        "from ..prune.methods.decoder import fastv",
        "from ..prune import methods",
        "import_module('vlmprune.prune.methods.decoder.fastv')",
    ],
)
def test_method_modules_are_seen(line):
    assert method_modules_in("adapters/x.py", line)


def test_method_names_are_seen():
    assert method_names_in("if name == 'fastv': ...") == {"fastv"}
    assert method_names_in("grid = rows * columns  # fastv\nsay('vlmprune.methods()')") == set()


# --- What a file of a method must say --------------------------------------------------------


@pytest.mark.parametrize(("path", "text"), METHOD_FILES.items(), ids=METHOD_FILES)
def test_method_docstring(path, text):
    doc = ast.get_docstring(ast.parse(text))
    pattern = r"(?s)(.+?)\n\nReference: (.+?)\nUpstream: (.+?)\nDiffers: (.+)"
    parts = re.fullmatch(pattern, doc)
    assert parts, f"{path}: one sentence, then Reference, Upstream and Differs"
    sentence, reference, upstream, differs = parts.groups()
    assert sentence.endswith(".")
    assert ". " not in sentence.replace("\n", " ")
    assert reference.startswith("none") or re.search(r"arXiv\s\d{4}\.\d{5}", reference)
    assert upstream.startswith("none") or re.search(r"commit\s[0-9a-f]{40}", upstream)
    assert differs.strip().endswith(".")


@pytest.mark.parametrize(("path", "text"), METHOD_FILES.items(), ids=METHOD_FILES)
def test_one_method_a_file_registered_under_its_name(path, text):
    registered = re.findall(r'^@register\("(\w+)"\)$', text, re.MULTILINE)
    assert registered == [Path(path).stem]


# --- Packaging -------------------------------------------------------------------------------


def test_the_list_of_packages_is_the_tree():
    found = []
    for folder, subfolders, files in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and not (here == Path() and name in NOT_PACKAGED)
        ]
        if "__init__.py" in files:
            found.append(".".join(["vlmprune", *here.parts]))
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(found)


def test_every_folder_with_modules_is_a_package():
    for layer in LAYERS:
        for path in MODULES[layer]:
            assert (ROOT / path).parent.joinpath("__init__.py").exists(), path
