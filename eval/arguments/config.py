"""`--config sweep.yaml` and `--preset NAME`: settings of a sweep that are not typed.

What is typed goes before the file, the file before the preset, the preset before the defaults.
Keys are the flags of `vlmprune sweep`, values what the command line takes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from ... import __version__
from ...prune.errors import VlmpruneError, did_you_mean
from ..presets import preset

FILE_NAME = "sweep.yaml"

_NO_KEYS = ("help", "config", "rerun")  # what is done once, and is no setting
_NOT_WRITTEN = ("verbosity",)  # does not change what is measured


class ConfigError(VlmpruneError, ValueError):
    """A configuration file that cannot be read, or a key or value in it that means nothing.

    Symptom: `sweep --config` names the file and the key.
    Cause: no YAML, or a key that is no flag of `sweep`.
    Type: flags as keys, e.g. `methods: [divprune, fastv]`; every sweep leaves a `sweep.yaml`.
    Page: ERRORS.md#configerror
    """


# --- Reading ---------------------------------------------------------------------------------


def layered(
    parser: argparse.ArgumentParser,
    *,
    config: str | None,
    preset_name: str | None,
    data: Sequence[str] = (),
) -> dict[str, Any]:
    """What the file and the preset put in the place of the parser's defaults.

    Args:
        parser: has the flags of the command, with their types and choices.
        config: the file, if one was given.
        preset_name: the preset that was typed; without, the file may name one.
        data: the files of questions that were typed, which take the place of all tasks that are
            not typed. A file names its own relative to the folder that it is in. Without a limit,
            all their questions are asked.

    Raises:
        ConfigError, UnknownPresetError: each says what is allowed.
    """
    of_file = _checked(parser, _read(Path(config)), config) if config else {}
    if config is not None and "data" in of_file:
        of_file["data"] = [os.path.normpath(Path(config).parent / path) for path in of_file["data"]]
    settings = dict(of_file)
    if named := preset_name or of_file.get("preset"):
        settings = of_preset(parser, named, "sweep") | of_file | {"preset": named}
    if data or "data" in of_file:
        settings.setdefault("limit", None)
        if data or "tasks" not in of_file:
            settings.pop("tasks", None)
    return settings


def of_preset(parser: argparse.ArgumentParser, name: str, command: str) -> dict[str, Any]:
    """What a preset of this command sets, as the parser would have given it.

    Raises:
        ConfigError: it is one of another command.
        UnknownPresetError: there is none.
    """
    found = preset(name)
    if found.command != command:
        raise ConfigError(
            f"Preset {name!r} is one of the other command: vlmprune {found.command} --preset {name}"
        )
    return _checked(parser, found.flags, f"preset {name}") | {"preset": name}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml is not typed
    """Refuses a key that is there twice; YAML itself would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)  # refuses keys that no dict can have
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is there twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return mapping


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise ConfigError(
            f"{str(path)!r} cannot be read ({error.strerror}): give a YAML file with flags of "
            f"`vlmprune sweep` as its keys, or a {FILE_NAME} that a sweep has written."
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        said = " ".join(str(error).replace("<unicode string>", path.name).split())
        raise ConfigError(f"{path} is not valid YAML: {said}.") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds {'nothing' if content is None else f'a {type(content).__name__}'}: "
            f"write flags of `vlmprune sweep` as keys, e.g. methods: [divprune, fastv]."
        )
    return content


def _checked(
    parser: argparse.ArgumentParser, settings: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """The settings as the parser would have given them."""
    actions = {a.dest: a for a in parser._actions if a.dest not in _NO_KEYS}
    values: dict[str, Any] = {}
    for key, value in settings.items():
        if key not in actions:
            raise ConfigError(f"{where}: unknown key {key!r}. {did_you_mean(str(key), actions)}")
        values[key] = _converted(actions[key], value, f"{where}: {key}")
    return values


def _converted(action: argparse.Action, value: Any, where: str) -> Any:
    if action.nargs == 0:  # a switch
        if not isinstance(value, bool):
            raise ConfigError(f"{where} is {value!r}: write true or false.")
        return value
    if action.dest == "model_args" and isinstance(value, dict):
        return ",".join(f"{key}={_model_arg(each, where)}" for key, each in value.items())
    if action.nargs == "+":
        words = value if isinstance(value, list) else [value]
        if not words:
            raise ConfigError(f"{where} is empty: {_allowed(action)}.")
        return [_one(action, word, where) for word in words]
    return _one(action, value, where)


def _one(action: argparse.Action, value: Any, where: str) -> Any:
    """A value through the flag's own type and choices."""
    text = _word(action, value, where)
    try:
        converted = action.type(text) if callable(action.type) else text
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{where}: {error}.") from error
    except ValueError as error:
        raise ConfigError(f"{where} is {value!r}: {_allowed(action)}.") from error
    if action.choices is not None and converted not in action.choices:
        raise ConfigError(f"{where} is {value!r}: {_allowed(action)}.")
    return converted


def _word(action: argparse.Action, value: Any, where: str) -> str:
    """A value as it would be typed."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ConfigError(f"{where} is {value!r}: {_allowed(action)}.")
    return str(value)


def _model_arg(value: Any, where: str) -> str:
    if not isinstance(value, str | int | float) or "," in str(value):
        raise ConfigError(
            f"{where}: {value!r} is not possible: write numbers, true, false, or words without "
            f"a comma."
        )
    return str(value)


def _allowed(action: argparse.Action) -> str:
    if action.choices is not None:
        return f"write one of {', '.join(map(str, action.choices))}"
    if action.nargs == "+":
        return f"write one {action.metavar} or a list, e.g. [{action.metavar}, {action.metavar}]"
    if action.dest == "model_args":
        return "write KEY=VALUE,... or a mapping of keys to numbers, words, true or false"
    if action.type is int:
        return "write a whole number"
    return f"write one {action.metavar or 'word or number'}"


# --- Writing ---------------------------------------------------------------------------------


def resolved(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, Any]:
    """Every setting of a sweep, to be written beside its results; what is unset is left out."""
    keys = [a.dest for a in parser._actions if a.dest not in (*_NO_KEYS, *_NOT_WRITTEN)]
    settings = {key: getattr(args, key) for key in keys}
    if settings["limit"] is None:
        settings["limit"] = "all"
    folder = settings["output_path"]
    settings["data"] = [os.path.relpath(path, folder) for path in settings["data"]]
    return {key: value for key, value in settings.items() if value not in (None, [])}


def write_config(folder: Path, settings: Mapping[str, Any]) -> Path:
    """Write `sweep.yaml`, whole or not at all; `vlmprune sweep --config` repeats it.

    The one of an earlier sweep with other settings is kept as `sweep-1.yaml`, the next one as
    `sweep-2.yaml`, and so on.

    Raises:
        ConfigError: the folder does not take it.
    """
    path = folder / FILE_NAME
    head = f"# vlmprune {__version__}. This sweep again: vlmprune sweep --config {FILE_NAME}\n"
    text = yaml.safe_dump(
        dict(settings), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    unfinished = path.with_name(f".{FILE_NAME}.{os.getpid()}")
    try:
        unfinished.write_text(head + text, encoding="utf-8")
        if path.exists() and path.read_text(encoding="utf-8").partition("\n")[2] != text:
            path.replace(_free_name(path))
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ConfigError(
            f"{path} cannot be written ({error.strerror}): make room, or choose another folder "
            f"with --output_path."
        ) from error
    return path


def _free_name(path: Path) -> Path:
    """`sweep-1.yaml`, or the next number that is free."""
    names = (path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return next(name for name in names if not name.exists())
