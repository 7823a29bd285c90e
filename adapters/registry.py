"""Model families by name. A file `adapters/families/<model_type>.py` holds one `Family`."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from functools import cache

from torch import nn

from ..prune.errors import UnsupportedModelError
from . import families as _families_package
from .family import Family


@cache
def _files() -> dict[str, str]:
    modules = pkgutil.iter_modules(_families_package.__path__, _families_package.__name__ + ".")
    return {m.name.rpartition(".")[2]: m.name for m in modules}


def model_names() -> list[str]:
    """Names (`model_type`) of the supported families."""
    return sorted(_files())


@cache
def family_class(name: str) -> type[Family]:
    """The family called `name`, one of `model_names()`."""
    module = importlib.import_module(_files()[name])
    found: list[type[Family]] = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, Family)
        and value.__module__ == module.__name__
    ]
    return found[0]


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model, bound to it.

    Raises:
        UnsupportedModelError: not a model of a supported family, or a variant it cannot prune.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    if name not in _files():
        what = f"model_type {name!r}" if name else "no configuration with a model_type"
        inside = _supported_inside(model)
        raise UnsupportedModelError(
            f"{type(model).__name__} ({what}) is not supported. "
            f"{f'It holds a model that is: pass model.{inside}. ' if inside else ''}"
            f"Supported model types: {', '.join(model_names())}."
        )
    if not hasattr(model, "generate") or model.base_model is model:
        raise UnsupportedModelError(
            f"{type(model).__name__} is a {name} model without its language head: "
            f"patch the ...ForConditionalGeneration model that holds it."
        )
    found = family_class(name)(model)
    found.check()
    return found


def _supported_inside(model: object) -> str | None:
    """Where a module that is no model itself, a trainer's for example, holds one."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    return next((path for path, module in modules if path and _is_supported(module)), None)


def _is_supported(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return getattr(config, "model_type", None) in _files() and hasattr(model, "generate")
