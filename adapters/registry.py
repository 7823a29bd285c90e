"""Model families by name. A file `adapters/families/<model_type>.py` holds one `Family`; other
packages add theirs in the entry-point group `vlmprune.families`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from importlib.metadata import entry_points

import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from ..prune.errors import UnsupportedModelError
from ..prune.plugins import Plugins, blamed, class_in, class_of
from . import families as _families_package
from .family import Family
from .image_models import image_model_names

ENTRY_POINT_GROUP = "vlmprune.families"
"""`model_type = "package.module:TheirFamily"` in the `pyproject.toml` of another package."""


@cache
def _files() -> dict[str, str]:
    """Families that the installed `transformers` is new enough for."""
    modules = pkgutil.iter_modules(_families_package.__path__, _families_package.__name__ + ".")
    named = {m.name.rpartition(".")[2]: m.name for m in modules}
    return {name: module for name, module in named.items() if _is_here(name, module)}


def _is_here(name: str, module: str) -> bool:
    """Whether the installed `transformers` has its models, as the family knows them."""
    if name not in CONFIG_MAPPING_NAMES:
        return False
    since = class_in(importlib.import_module(module), Family).since
    if since == Family.since:  # what the package requires as a whole: the installer's to hold
        return True
    return _release(transformers.__version__) >= _release(since)


def _release(version: str) -> tuple[int, ...]:
    """(5, 23) of 5.23.0."""
    return tuple(int(part) for part in version.split(".")[:2])


@cache
def _plugins() -> Plugins:
    """Families of other packages; of names that are taken a warning is logged, once."""
    return Plugins.of(entry_points(group=ENTRY_POINT_GROUP), _files(), what="model family")


def model_names() -> list[str]:
    """Names (`model_type`) of the supported families: shipped, and installed by third parties."""
    return sorted({*_files(), *_plugins().points})


def family_notes() -> list[str]:
    """What is to be said of names that several packages take."""
    return list(_plugins().notes)


@cache
def family_class(name: str) -> type[Family]:
    """The family called `name`, one of `model_names()`; imports only the file that holds it.

    Raises:
        PluginError: it is another package's, which cannot be imported.
    """
    if name in _files():
        return class_in(importlib.import_module(_files()[name]), Family)
    point = _plugins().points[name]
    with blamed(point, what="model family"):
        found = class_of(point.load(), Family)
        if getattr(found, "name", None) != name:
            raise ValueError(
                f"{found.__qualname__}.name is not {name!r}, the model_type that its entry point "
                f"has"
            )
    return found


def family_of(model: nn.Module) -> Family:
    """The family of a loaded model, bound to it.

    Raises:
        UnsupportedModelError: not a model of a supported family, or a variant it cannot prune.
        PluginError: the family is another package's, which cannot be imported.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    if name not in model_names():
        what = f"model_type {name!r}" if name else "no configuration with a model_type"
        inside = _supported_inside(model)
        raise UnsupportedModelError(
            f"{type(model).__name__} ({what}) is not supported. "
            f"{f'It holds a model that is: pass model.{inside}. ' if inside else ''}"
            f"Supported model types: {', '.join(model_names())}; and image encoders without an "
            f"LLM, {', '.join(image_model_names())}."
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
    return getattr(config, "model_type", None) in model_names() and hasattr(model, "generate")
