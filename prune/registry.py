"""Method names -> classes: `prune/methods/<place>/<name>.py` registers the class for `<name>`."""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib.metadata import entry_points
from typing import TypeVar

from .budget import BUDGET_WORDS, Budget, MethodCall
from .contract import Attending, BeforeLLM, Compressing, InDecoder, InEncoder, Method
from .errors import BudgetError, MethodFieldError, PluginError, UnknownMethodError, did_you_mean
from .plugins import ENTRY_POINT_GROUP, Plugins, blamed
from .shipped import ELSEWHERE, PACKAGE, shipped

_BASES = (InEncoder, BeforeLLM, InDecoder, Compressing, Attending)
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
            owner = (shipped().get(name, cls.__module__), cls.__qualname__)
        other = next((n for n, c in _classes.items() if c is cls and n != name), None)
        if name in ELSEWHERE:
            raise ValueError(f"Method name {name!r} is taken: it {ELSEWHERE[name]}")
        if other is not None:
            raise ValueError(
                f"{cls.__qualname__} is {other!r} already: register it under one name."
            )
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
def _plugins() -> Plugins:
    """Methods of other packages; of names that are taken a warning is logged, once."""
    return Plugins.of(entry_points(group=ENTRY_POINT_GROUP), shipped())


def is_shipped(cls: type[Method]) -> bool:
    """Whether a class is one of this package's methods, and not somebody else's."""
    return cls.__module__.startswith(PACKAGE + ".")


def method_names() -> list[str]:
    """Names of all methods: shipped, installed by third parties, registered in this process."""
    return sorted({*shipped(), *_plugins().points, *_classes})


def method_class(name: str) -> type[Method]:
    """The class registered as `name`; imports only the file that holds it.

    Raises:
        UnknownMethodError: nobody has registered it.
        PluginError: it is another package's, which cannot be imported.
    """
    if name not in _classes:
        if name in shipped():
            importlib.import_module(shipped()[name])
        elif name in _plugins().points:
            _load_plugin(name)
        else:
            raise UnknownMethodError(f"Unknown method {name!r}. {_hint(name)}")
    return _classes[name]


def default_methods() -> tuple[dict[str, Method], dict[str, str]]:
    """Every method with its default fields; and why, of those of which there is none."""
    made: dict[str, Method] = {}
    wrong: dict[str, str] = {}
    for name in method_names():
        try:
            made[name] = method_class(name)()
        except PluginError as error:
            wrong[name] = str(error)
        except Exception as error:  # somebody's own class may do anything
            wrong[name] = f"{name} cannot be made without fields: {error}"
    return made, wrong


def registered_names() -> dict[str, str]:
    """Names of the methods that are imported by now, and the modules that hold their classes."""
    return {name: cls.__module__ for name, cls in _classes.items()}


def plugin_notes() -> list[str]:
    """What is to be said of names that several packages take."""
    return list(_plugins().notes)


def _load_plugin(name: str) -> None:
    """Import another package's method; what a failing import has registered is forgotten."""
    point, before = _plugins().points[name], set(_classes)
    with blamed(point, what="method"):
        try:
            register(name)(point.load())
        except BaseException:
            new = [n for n, cls in _classes.items() if n not in before and not is_shipped(cls)]
            for added in new:
                del _classes[added]
            raise


def _hint(name: str) -> str:
    head, *more = re.split("[:@+]", name)
    if head in ELSEWHERE:
        return f"It {ELSEWHERE[head]}"
    if head not in method_names() or not "".join(more):
        return did_you_mean(name, method_names())
    return (
        "That is a word of the command line. In Python fields and the budget are keywords: "
        'vlmprune.method("fastv", layer=3, keep_ratio=0.25), and several methods are a list.'
    )


def method(name: str, **fields_and_budget: object) -> MethodCall:
    """A method with its fields and its budget, e.g. `method("fastv", keep_ratio=0.25, layer=2)`.

    Args:
        name: one of `methods()`.
        **fields_and_budget: at most one budget word (`keep_ratio`, `keep_tokens`,
            `average_tokens`, `flops_ratio`) and any fields of the method.

    Raises:
        UnknownMethodError, MethodFieldError, BudgetError: each says what to type instead.
    """
    words = {k: v for k, v in fields_and_budget.items() if k in BUDGET_WORDS and v is not None}
    given = {k: v for k, v in fields_and_budget.items() if k not in BUDGET_WORDS}
    made, budget = made_of(name, given), Budget.of(**words)
    if budget is None and made.wants_budget:
        raise BudgetError(
            f"{name} needs a budget: pass one of keep_ratio=0.25, keep_tokens=64, "
            f"average_tokens=128 or flops_ratio=0.3."
        )
    return MethodCall(method=made, budget=budget)


def made_of(name: str, fields: Mapping[str, object]) -> Method:
    """A method with its fields alone.

    Raises:
        UnknownMethodError, MethodFieldError: each says what to type instead.
    """
    cls = method_class(name)
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in fields:
        if key not in known:
            raise MethodFieldError(
                f"{name} has no field {key!r}. {did_you_mean(key, [*known, *BUDGET_WORDS])}"
            )
    try:
        return cls(**fields)
    except TypeError as error:  # a value of another type than the class counts on, or too few
        shown = ", ".join(f"{key}={value!r}" for key, value in fields.items()) or "no fields"
        raise MethodFieldError(f"{name} with {shown} is not possible: {error}.") from error
