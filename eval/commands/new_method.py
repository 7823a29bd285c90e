"""`vlmprune new-method`: a file with a method that works, to be changed into another."""

from __future__ import annotations

import keyword
import sys
from importlib.metadata import packages_distributions
from importlib.resources import files
from pathlib import Path
from string import Template

from ...prune.errors import MethodFieldError
from ...prune.registry import method_names
from ..arguments.new_method import NewRequest, Where
from ..console import stdout


def run(request: NewRequest) -> int:
    """The command. Returns the exit code."""
    name = request.name
    path = write_method(name, request.place, Path(request.output_path or f"{name}.py"))
    stdout().print(f"{path} is written. Next: vlmprune check-method {path}", markup=False)
    return 0


def write_method(name: str, place: Where, path: Path) -> Path:
    """Write the file of a method `name` that acts at `place`.

    Raises:
        MethodFieldError: the name is taken or no name, or the file is there already.
    """
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        raise MethodFieldError(
            f"{name!r} cannot name a method: use lower-case letters, digits and _, not first a "
            f"digit, e.g. my_method."
        )
    if name in method_names():
        raise MethodFieldError(f"The name {name!r} is taken: `vlmprune methods` lists all.")
    if path.suffix != ".py" or not path.stem.isidentifier():
        raise MethodFieldError(f"{str(path)!r} cannot be imported: give a file like {name}.py.")
    if path.stem in {*sys.stdlib_module_names, *packages_distributions()}:
        raise MethodFieldError(
            f"{path.name} would stand in the way of the module {path.stem!r} in that folder: "
            f"take another name, e.g. {name}_pruning."
        )
    text = method_text(name, place, path)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise MethodFieldError(
            f"{str(path)!r} is there already, and is not written over: give another file with -o."
        ) from None
    except OSError as error:
        raise MethodFieldError(f"{str(path)!r} cannot be written: {error.strerror}.") from error
    return path


def method_text(name: str, place: Where, path: Path) -> str:
    """The file's text."""
    template = files(__package__).joinpath("templates", f"{place}.py.txt")
    words = {
        "name": name,
        "title": name.replace("_", " ").capitalize(),
        "cls": "".join(part.capitalize() for part in name.split("_")) or "Method",
        "file": path.name,
        "module": path.stem,
    }
    return Template(template.read_text(encoding="utf-8")).substitute(words)
