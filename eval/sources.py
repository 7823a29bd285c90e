"""What the code of a method or task is: a hash that another code does not have.

Shipped code stands for itself by its version (`prune.shipped.VERSIONS`, `Task.version`). Of all
other code the source counts: the file of its module and of the own modules that this imports; in a
notebook or script the definition, with the functions and values that it refers to. Where the source
cannot be had, nothing is known of the code. Files that it reads (weights) are not seen.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import functools
import importlib.util
import inspect
import linecache
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from ..prune import shipped
from .content_hash import content_hash

UNKNOWN = "unknown"
"""In place of a hash, for code whose source cannot be had."""

_PACKAGE = __name__.partition(".")[0]
_INSTALLED = {"site-packages", "dist-packages"}
_STANDARD = Path(sysconfig.get_path("stdlib")).resolve()
_OF_DATACLASSES = ("__init__", "__repr__", "__eq__", "__hash__", "__setattr__", "__delattr__")


class Source:
    """The code that a class is made of, its bases' included."""

    def __init__(self, cls: type) -> None:
        self.gaps: list[str] = []
        """Why it is not known, where it is not."""
        self._top = cls.__module__.partition(".")[0]  # an own package may be an installed one
        self._parts: dict[str, object] = {}
        for base in cls.__mro__:
            self._add(base)
        if not self._own and self._top != _PACKAGE:
            self.gaps.append(f"{cls.__qualname__} is from no file")

    @property
    def hash(self) -> str | None:
        """None for shipped code, `UNKNOWN` where something of it is not known."""
        if self.gaps:
            return UNKNOWN
        return content_hash(self._parts) if self._own else None

    @property
    def _own(self) -> bool:
        """Whether there is anything beside versions of shipped methods."""
        return not all(isinstance(part, int) for part in self._parts.values())

    def _is_own(self, module: str) -> bool:
        """Neither shipped nor somebody else's."""
        top = module.partition(".")[0]
        if top == _PACKAGE:
            return module.startswith(f"{shipped.PACKAGE}.") and not shipped.settled(module)
        file = getattr(sys.modules.get(module), "__file__", None)
        if file is None:  # a notebook, a string; else built in
            return module == "__main__" or module not in sys.modules
        path = Path(file).resolve()
        if path.suffix != ".py":
            return False
        standard = path.is_relative_to(_STANDARD) or bool(_INSTALLED & set(path.parts))
        return top == self._top or not standard

    def _add_module(self, name: str) -> None:
        """A file, with the own modules that it imports; of a shipped method its version."""
        if name in self._parts:
            return
        if method := shipped.settled(name):
            self._parts[name] = shipped.VERSIONS[method]
        elif self._is_own(name):
            module = sys.modules[name]
            text = "".join(_lines(str(module.__file__)))
            self._parts[name] = text
            for imported in _imports(text, module.__package__ or ""):
                if imported in sys.modules:
                    self._add_module(imported)

    def _add(self, thing: type | FunctionType) -> None:
        """A class or function, with everything of its own that it refers to."""
        where = _module_of(thing)
        in_file = where in sys.modules and where != "__main__"
        if in_file:
            self._add_module(where)
        key = f"{where}:{thing.__qualname__}"
        if not self._is_own(where) or key in self._parts:
            return
        self._parts[key] = None
        if isinstance(thing, type):
            for name, value in vars(thing).items():
                if not (name.startswith(("__", "_abc_")) or hasattr(value, "__get__")):
                    self._add_value(f"{key}.{name}", value)
        for function in _functions(thing):
            if _module_of(function) == where:
                self._add_function(key, function, in_file)
            else:
                self._add(function)

    def _add_function(self, key: str, function: FunctionType, in_file: bool) -> None:
        code = function.__code__
        statement = _statement(code)
        if statement is None:
            self.gaps.append(
                f"{function.__qualname__} is not as in {code.co_filename}: a file that was edited "
                f"must be imported again"
                if _lines(code.co_filename)
                else f"the source of {function.__qualname__} cannot be had: write it to a file"
            )
        values = _closed_over(function)
        values |= {"defaults": function.__defaults__, "keywords": function.__kwdefaults__}
        if not in_file:
            self._parts[f"{key}:{function.__qualname__}"] = statement
            values |= {name: function.__globals__[name] for name in _globals(function)}
        for name, value in values.items():
            self._add_value(f"{key}:{function.__qualname__}:{name}", value)

    def _add_value(self, key: str, value: Any) -> None:
        if isinstance(value, ModuleType):
            if value.__name__ in sys.modules:
                self._add_module(value.__name__)
        elif isinstance(value, type | FunctionType):
            self._add(value)
        elif isinstance(value, functools.partial):
            self._add_value(f"{key}.func", value.func)
            self._add_value(f"{key}.args", (value.args, value.keywords))
        else:
            self._add(type(value))
            try:
                self._parts[key] = content_hash(value)
            except (TypeError, OSError):
                self._add_unusual(key, value)

    def _add_unusual(self, key: str, value: Any) -> None:
        """What is no plain value, and may hold anything."""
        if isinstance(value, Mapping):
            self._add_value(f"{key}.keys", list(map(str, value)))
            value = list(value.values())
        if isinstance(value, list | tuple):
            for number, each in enumerate(value):
                self._add_value(f"{key}.{number}", each)
            return
        said = repr(value)
        if " at 0x" in said or hasattr(value, "state_dict"):
            name, kind = key.rpartition(":")[2], type(value).__qualname__
            self.gaps.append(f"it reads {name}, and nobody knows what is in a {kind}")
        self._parts[key] = said


# --- Reading code ----------------------------------------------------------------------------


def _module_of(thing: type | FunctionType) -> str:
    """Where it was written; a decorator may have given a function another `__module__`."""
    if isinstance(thing, type):
        return thing.__module__
    return str(thing.__globals__.get("__name__"))


def _functions(thing: type | FunctionType) -> Iterator[FunctionType]:
    """The functions that a definition holds, without those that `dataclass` writes."""
    if isinstance(thing, FunctionType):
        yield thing
        return
    written = _OF_DATACLASSES if dataclasses.is_dataclass(thing) else ()
    for name, value in vars(thing).items():
        parts = [getattr(value, part, None) for part in ("fget", "fset", "__func__", "func")]
        for function in map(inspect.unwrap, filter(callable, [value, *parts])):
            if not isinstance(function, FunctionType):
                continue
            if name not in written or function.__code__.co_filename != "<string>":
                yield function


def _closed_over(function: FunctionType) -> dict[str, Any]:
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not bound yet
            continue
    return found


def _globals(function: FunctionType) -> list[str]:
    """Names of the module that a function reads."""
    names = {
        instruction.argval
        for code in _codes(function.__code__)
        for instruction in dis.get_instructions(code)
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }
    return sorted(name for name in names if name in function.__globals__)


def _imports(text: str, package: str) -> Iterator[str]:
    """Names of modules that a source imports, and some that are none."""
    for node in ast.walk(_read(text)[0]):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            name = importlib.util.resolve_name(relative, package) if node.level else relative
            yield name
            yield from (f"{name}.{alias.name}" for alias in node.names)


def _lines(file: str) -> list[str]:
    linecache.checkcache(file)
    return linecache.getlines(file)


def _statement(code: CodeType) -> str | None:
    """The outermost statement that a code is from; None if its source is gone or another."""
    lines = _lines(code.co_filename)
    tree, shapes = _read("".join(lines))
    if _shape(code) not in shapes:
        return None
    for node in tree.body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        if first <= code.co_firstlineno <= (node.end_lineno or first):
            return "".join(lines[first - 1 : node.end_lineno])
    return None


@functools.lru_cache(maxsize=64)
def _read(text: str) -> tuple[ast.Module, frozenset[tuple[object, ...]]]:
    """A source as statements, and all that it defines, compiled; nothing if it cannot be.

    Compiled as a whole and statement by statement, as notebooks do: calls of what an `import` of
    the same unit brought are other instructions.
    """
    try:
        tree = ast.parse(text)
        units: list[str | ast.Module] = [text, *(ast.Module([node], []) for node in tree.body)]
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
        compiled = [compile(unit, "", "exec", flags, True) for unit in units]
        return tree, frozenset(_shape(code) for whole in compiled for code in _codes(whole))
    except (SyntaxError, ValueError):
        return ast.Module([], []), frozenset()


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A code and all that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _shape(code: CodeType) -> tuple[object, ...]:
    """What a code does, wherever it stands."""
    constants = []
    for value in code.co_consts:
        if isinstance(value, CodeType):
            constants.append(_shape(value))
        elif isinstance(value, frozenset):  # in any order
            constants.append(tuple(sorted(map(repr, value))))
        else:
            constants.append((repr(value),))
    return code.co_qualname, code.co_code, code.co_names, code.co_varnames, *constants
