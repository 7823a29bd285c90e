"""Methods in a file of one's own: `--import FILE`, which registers them as any import does."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from ..prune.errors import PluginError
from ..prune.registry import registered_names


def import_methods(source: str) -> list[str]:
    """Import a file `path/to/mine.py`, or a module by its dotted name.

    Returns:
        the names of the methods that it registers.

    Raises:
        PluginError: there is no such file or module, it raises an error, or registers no method.
    """
    before = registered_names()
    is_file = source.endswith(".py")
    if is_file and not Path(source).is_file():
        raise PluginError(f"There is no file {source!r} to import methods from.")
    try:
        module = _from_file(Path(source)) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise PluginError(
            f"{source!r} cannot be imported: it raised {type(error).__name__}: {error}."
            + ("" if is_file else " Give a file (mine.py) or the name of an installed module.")
        ) from error
    inside = f"{module.__name__}."
    found = [
        name
        for name, home in registered_names().items()
        if name not in before or f"{home}.".startswith(inside)
    ]
    if not found:
        raise PluginError(
            f'{source!r} registers no method: put @register("name") above its class '
            f"(from vlmprune.prune.registry import register)."
        )
    return found


def _from_file(path: Path) -> ModuleType:
    """The module of a file, under the file's name; a second time it is the same one."""
    path = path.resolve(strict=True)
    name = path.stem
    while (known := sys.modules.get(name)) is not None:
        if getattr(known, "__file__", None) == str(path):
            return known
        name = f"methods_in_{name}"  # that name belongs to another module
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # noqa: S101  (it ends on .py)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
