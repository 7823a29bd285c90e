"""Method names -> classes: `prune/methods/<place>/<name>.py` registers the class for `<name>`."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from . import methods as _methods_package
from .budget import BUDGET_WORDS, Budget, MethodCall
from .contract import Attending, BeforeLLM, Compressing, InDecoder, Method
from .errors import BudgetError, MethodFieldError, UnknownMethodError, did_you_mean

ENTRY_POINT_GROUP = "vlmprune.methods"

_BASES = (BeforeLLM, InDecoder, Compressing, Attending)
_M = TypeVar("_M", bound=type[Method])
_classes: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[_M], _M]:
    """Class decorator: make a `Method` known as `name`. Two classes of one name are an error."""

    def decorate(cls: _M) -> _M:
        if not issubclass(cls, Method) or not dataclasses.is_dataclass(cls):
            raise TypeError(f"{cls!r} cannot be registered: derive a frozen dataclass from Method.")
        if not issubclass(cls, _BASES):
            names = ", ".join(base.__name__ for base in _BASES)
            raise TypeError(f"{cls!r} acts nowhere: derive it from one of {names}.")
        this = (cls.__module__, cls.__qualname__)
        known = _classes.get(name)
        if known is not None:
            owner = (known.__module__, known.__qualname__)
        else:  # a shipped method owns its name before its file is imported
            owner = (_shipped().get(name, cls.__module__), cls.__qualname__)
        if owner != this:
            raise ValueError(
                f"Method name {name!r} is taken by {owner[0]}: "
                f"register {cls.__qualname__} under another name."
            )
        cls.name = name
        _classes[name] = cls
        return cls

    return decorate


@cache
def _shipped() -> dict[str, str]:
    """Method name -> module of the methods in this package, found without importing them."""
    prefix = _methods_package.__name__ + "."
    modules = pkgutil.walk_packages(_methods_package.__path__, prefix)
    return {m.name.rpartition(".")[2]: m.name for m in modules if not m.ispkg}


@cache
def _third_party() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=ENTRY_POINT_GROUP)}


def is_shipped(cls: type[Method]) -> bool:
    """Whether a class is one of this package's methods, and not somebody else's."""
    return cls.__module__.startswith(_methods_package.__name__ + ".")


def method_names() -> list[str]:
    """Names of all methods: shipped, installed by third parties, registered in this process."""
    return sorted({*_shipped(), *_third_party(), *_classes})


def method_class(name: str) -> type[Method]:
    """The class registered as `name`; imports only the file that holds it."""
    if name not in _classes:
        if name in _shipped():
            importlib.import_module(_shipped()[name])
        elif name in _third_party():
            register(name)(_third_party()[name].load())
        else:
            raise UnknownMethodError(
                f"Unknown method {name!r}. {did_you_mean(name, method_names())}"
            )
    return _classes[name]


def method(name: str, **fields_and_budget: object) -> MethodCall:
    """A method with its fields and its budget, e.g. `method("fastv", keep_ratio=0.25, layer=2)`.

    Args:
        name: one of `methods()`.
        **fields_and_budget: at most one budget word (`keep_ratio`, `keep_tokens`,
            `average_tokens`, `flops_ratio`) and any fields of the method.

    Raises:
        UnknownMethodError, MethodFieldError, BudgetError: each says what to type instead.
    """
    cls = method_class(name)
    words = {k: v for k, v in fields_and_budget.items() if k in BUDGET_WORDS and v is not None}
    given = {k: v for k, v in fields_and_budget.items() if k not in BUDGET_WORDS}
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in given:
        if key not in known:
            raise MethodFieldError(
                f"{name} has no field {key!r}. {did_you_mean(key, [*known, *BUDGET_WORDS])}"
            )
    budget = Budget.of(**words)
    if budget is None and cls.needs_budget:
        raise BudgetError(
            f"{name} needs a budget: pass one of keep_ratio=0.25, keep_tokens=64, "
            f"average_tokens=128 or flops_ratio=0.3."
        )
    return MethodCall(method=cls(**given), budget=budget)
