"""The command line: `vlmprune sweep | tune | report | ask | compare | bench | methods | ...`.

A verb has its arguments in `arguments/`, read with nothing heavy imported, so that `--help` is
instant; what it does is in `commands/`, imported when it runs. Exit codes: 0 done, 1 a cell
failed, 2 wrong usage (or an error that says what to type instead), 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType

from .. import __version__
from .arguments import (
    ask,
    bench,
    bench_model,
    bench_scale,
    bench_select,
    bench_serve,
    check_method,
    classify,
    compare,
    methods,
    models,
    new_method,
    presets,
    report,
    sweep,
    tune,
    vllm_args,
    where,
)
from .arguments.shared import OneLineParser, verbosity_argument

VERBS: Mapping[str, ModuleType] = {
    "sweep": sweep,
    "tune": tune,
    "report": report,
    "ask": ask,
    "compare": compare,
    "classify": classify,
    "bench": bench,
    "check-method": check_method,
    "new-method": new_method,
    "methods": methods,
    "models": models,
    "presets": presets,
    "vllm-args": vllm_args,
    "where": where,
}
"""Each has `HELP`, `EXAMPLES`, `add_arguments(parser)` and `request(args)`, and those with presets
`set_elsewhere(args)`, which gives what they put in the place of defaults; the module of the same
name in `commands/` has `run(request)`, which returns the exit code."""
BENCHES: Mapping[str, ModuleType] = {
    "model": bench_model,
    "select": bench_select,
    "scale": bench_scale,
    "serve": bench_serve,
}
"""What `bench` measures, likewise."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # Idle threads sleep instead of spinning: beside another busy process, spinning made small
    # models more than ten times slower. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "verb"):
        parser.print_help()
        return 2
    from ..prune.errors import VlmpruneError
    from .console import quiet_transformers, set_up_logging

    set_up_logging(args.verbosity)
    try:
        elsewhere = getattr(args.verb, "set_elsewhere", None)
        if elsewhere is not None and (given := elsewhere(args)):
            args = build_parser({args.command: given}).parse_args(argv)
        if imports := getattr(args, "imports", []):
            from .importing import import_methods

            for source in imports:
                import_methods(source)
        request = args.verb.request(args)
        quiet_transformers(args.verbosity)
        name = args.verb.__name__.rpartition(".")[2]
        command = import_module(f".commands.{name}", __package__)
        return int(command.run(request))
    except VlmpruneError as error:
        if args.verbosity == "DEBUG":
            logging.getLogger("vlmprune").exception("traceback of the error below")
        from .words.flags import in_flags

        budget_flags = hasattr(args, "keep_ratio")
        lines = getattr(error, "lines", (str(error),))
        first, *others = (in_flags(line, budget_flags=budget_flags) for line in lines)
        sys.stderr.write(f"vlmprune {args.command}: error: {' '.join(first.split())}\n")
        sys.stderr.writelines(f"  {' '.join(line.split())}\n" for line in others)
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def build_parser(
    defaults: Mapping[str, Mapping[str, object]] | None = None,
) -> argparse.ArgumentParser:
    """All commands and their arguments.

    Args:
        defaults: by command, what takes the place of its own defaults.
    """
    parser = OneLineParser(
        prog="vlmprune",
        description="Token pruning for vision-language models: measure what it costs and saves.",
    )
    parser.add_argument("--version", action="version", version=f"vlmprune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, verb in VERBS.items():
        sub = commands.add_parser(
            name,
            help=verb.HELP,
            description=_sentence(verb.HELP),
            epilog=verb.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verbosity_argument(sub, "WARNING")
        if verb is bench:
            _add_benches(sub)
        else:
            verb.add_arguments(sub)
            sub.set_defaults(verb=verb)
        sub.set_defaults(**(defaults or {}).get(name, {}))
    return parser


def _add_benches(parser: argparse.ArgumentParser) -> None:
    whats = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for name, verb in BENCHES.items():
        sub = whats.add_parser(name, help=verb.HELP, description=_sentence(verb.HELP))
        verb.add_arguments(sub)
        verbosity_argument(sub, argparse.SUPPRESS)
        sub.set_defaults(verb=verb)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
