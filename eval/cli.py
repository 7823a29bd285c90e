"""The command line: `vlmprune sweep | report | ask | compare | bench | methods | models | ...`.

Arguments are read here, with nothing heavy imported, so that `--help` is instant; the work is in
the modules that each command imports when it runs. Exit codes: 0 done, 1 a cell failed, 2 wrong
usage (or an error that says what to type instead), 130 interrupted.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NoReturn

from .. import __version__
from .words.typed import parse_fields, split_list

if TYPE_CHECKING:
    from .commands.comparing import ModelFlags

DEFAULT_METHODS = ("random", "grid", "divprune", "vtc_cls", "hiprune", "fastv")
_PAGE_WIDTH = 100
DEFAULT_BUDGETS = ("published", "0.5", "0.25", "0.11")

_METHOD_WORD = (
    "name:field=value sets a field of a method, name@budget gives it a budget of its own, and "
    "name+name runs several, e.g. divprune@0.5+fastv:layer=3"
)
_BUDGET_WORD = (
    "0.25: ratio kept; 64: tokens kept; avg:64: mean tokens per layer; flops:0.3: share of dense "
    "FLOPs; published: the method's own schedule or rule, where it has one"
)

_SWEEP_EXAMPLES = """\
examples:
  vlmprune sweep
      the embedded model and benchmark: a table, ./vlmprune_runs/runs.jsonl and frontier.png
  vlmprune sweep --methods divprune,vtc_cls --budgets 0.5,64,avg:48 --limit all
  vlmprune sweep --methods fastv:layer=3 fastv:layer=1 --budgets 0.25 -o ./layers
  vlmprune sweep --methods divprune@0.5+fastv --budgets 0.25,0.11
      two methods at once, the first with a budget of its own; every budget is a share of the
      tokens that the image had at first
  vlmprune sweep --kinds read --limit all
      only questions of this kind, whose answers have two or three words
  vlmprune sweep --data my.jsonl --matching contains --model Qwen/Qwen2.5-VL-7B-Instruct
      your own questions, one JSON object a line:
      {"image": "a.jpg", "question": "What is it?", "answer": "a cat", "kind": "animals"}
      {"image": "b.jpg", "question": "Where?", "choices": ["in", "out"], "answer": "A"}
  vlmprune sweep --model llava-hf/llava-1.5-7b-hf --tasks gqa,pope --device cuda --batch_size 16
  vlmprune sweep --preset llava-1.5 --methods divprune,fastv --device cuda -o llava
      the literature's budgets and tasks for a model, with methods of your choice
  vlmprune sweep --config vlmprune_runs/sweep.yaml --limit all
      an earlier sweep again, with another number of questions
  torchrun --nproc_per_node 2 -m vlmprune sweep --limit 100
      two processes share the questions

Interrupt it when you like: the same command goes on where it stopped. The table and the picture
show every cell in the folder with the same model, questions and seed, so that a later call with
other methods or budgets adds to them. Exit code: 0, or 1 if a cell failed.
"""
_REPORT_EXAMPLES = """\
examples:
  vlmprune report ./vlmprune_runs -o report.html
      one page that opens offline: frontier, tables, pictures of the kept tokens, configurations
  vlmprune report a/runs.jsonl b/runs.jsonl -o report.md
  vlmprune report ./vlmprune_runs -o numbers.csv
  vlmprune report ./vlmprune_runs -o table.tex
      for a paper: \\input{table.tex}, with \\usepackage{booktabs}
  vlmprune report ./vlmprune_runs -o ./lm_eval_results
      a folder: results_*.json and samples_*.jsonl as lm-eval writes them
"""
_ASK_EXAMPLES = """\
examples:
  vlmprune ask embedded:24 --method divprune --keep_ratio 0.2 --save overlay.png
      question 24 of the embedded benchmark
  vlmprune ask scene.png "what color is the shirt ?" --method fastv --keep_tokens 40
  vlmprune ask cat.jpg "What is the cat doing?" --model llava-hf/llava-1.5-7b-hf \\
      --method fastv --method_args layer=3 --average_tokens 128
  vlmprune ask embedded:24 --method divprune@0.5+fastv:layer=3@0.25
"""
_COMPARE_EXAMPLES = """\
examples:
  vlmprune compare embedded:18 --methods divprune,fastv,vtc_cls --keep_ratio 0.2 --save all.png
      one picture of all: what each kept, and what it said to it
  vlmprune compare embedded:24 embedded:31 --methods divprune --budgets 0.5,0.25,0.11
  vlmprune compare cat.jpg dog.jpg "What is it doing?" --methods divprune,fastv:layer=3@0.5 \\
      --keep_tokens 64 --model llava-hf/llava-1.5-7b-hf --save all.png
      the same question about two pictures
  vlmprune compare cat.jpg "What color is it?" --methods divprune@0.5+fastv,pyramiddrop@published \\
      --keep_ratio 0.2 --answer black
"""
_METHODS_EXAMPLES = """\
examples:
  vlmprune methods
  vlmprune methods fastv
      its paper and official code, what differs from it, fields, budgets, and models that it runs on
"""
_BENCH_EXAMPLES = """\
examples:
  vlmprune bench model
      12 layers of width 1024 and 576 visual tokens, random weights
  vlmprune bench model --shape qwen2.5-vl-7b --methods divprune --budgets 0.333,0.111
  vlmprune bench model --shape llava-next-small --batch_size 8
  vlmprune bench model --methods divprune fastv --budgets 0.25 --layers 4 --repeats 5
  vlmprune bench model --methods divprune@0.5+fastv@0.25 --new_tokens 64 --memory
  vlmprune bench select
      time of choosing, of every method before the LLM, beside a plain transcription
  vlmprune bench scale --methods divprune fastv --tokens 256,1024,4096
      how time and memory of choosing grow with the number of visual tokens
"""


_CHECK_EXAMPLES = """\
examples:
  vlmprune check-method fastv:layer=1
  vlmprune check-method ./mine.py
      every method that the file registers
  vlmprune check-method mine --import ./mine.py --layouts llava_next

Exit code: 0, or 1 if something FAILs.
"""
_NEW_EXAMPLES = """\
examples:
  vlmprune new-method mine --place before_llm
      writes ./mine.py, a method that works: change its rule, then
  vlmprune check-method ./mine.py
  vlmprune sweep --import ./mine.py --methods mine,divprune --budgets 0.25
"""


class _Parser(argparse.ArgumentParser):
    """Errors of usage in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    # Idle threads sleep instead of spinning: beside another busy process, spinning made small
    # models more than ten times slower. Must be set before torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    parser = build_parser()
    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 2
    from ..prune.errors import VlmpruneError
    from .console import quiet_transformers, set_up_logging

    set_up_logging(args.verbosity)
    try:
        if args.command == "sweep" and (args.config or args.preset or args.data):
            from .commands.config import layered

            given = layered(
                sweep_parser(), config=args.config, preset_name=args.preset, data=args.data
            )
            args = build_parser(given).parse_args(argv)
        if imports := getattr(args, "imports", []):
            from .importing import import_methods

            for source in imports:
                import_methods(source)
        _check(args)
        quiet_transformers(args.verbosity)
        return args.run(args)
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


def build_parser(sweep_defaults: Mapping[str, object] | None = None) -> argparse.ArgumentParser:
    """All commands and their arguments.

    Args:
        sweep_defaults: take the place of defaults of the sweep command.
    """
    parser = _Parser(
        prog="vlmprune",
        description="Token pruning for vision-language models: measure what it costs and saves.",
    )
    parser.add_argument("--version", action="version", version=f"vlmprune {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], int], text: str, epilog: str | None = None
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _verbosity_argument(sub, "WARNING")
        sub.set_defaults(run=run)
        return sub

    sweep = command("sweep", _sweep, "evaluate a grid of methods x budgets", _SWEEP_EXAMPLES)
    _sweep_arguments(sweep)
    sweep.set_defaults(**(sweep_defaults or {}))
    _report_arguments(
        command("report", _report, "show the results of sweeps, e.g. as a page", _REPORT_EXAMPLES)
    )
    _ask_arguments(
        command("ask", _ask, "ask one question, dense and pruned, and compare", _ASK_EXAMPLES)
    )
    _compare_arguments(
        command(
            "compare",
            _compare,
            "ask one question with several methods, side by side",
            _COMPARE_EXAMPLES,
        )
    )
    bench = command(
        "bench",
        _bench,
        "time models, or the choice of tokens alone, at many sizes",
        _BENCH_EXAMPLES,
    )
    _bench_commands(bench)
    check = command(
        "check-method",
        _check_method,
        "run a method on tiny models of all layouts and say what it breaks",
        _CHECK_EXAMPLES,
    )
    _check_arguments(check)
    new = command("new-method", _new_method, "write a file with a new method", _NEW_EXAMPLES)
    _new_arguments(new)
    methods = command(
        "methods", _methods, "list the pruning methods, or tell all about one", _METHODS_EXAMPLES
    )
    methods.add_argument(
        "name", nargs="?", metavar="NAME", help="what it does, reads and takes, and where it runs"
    )
    _import_argument(methods)
    command("models", _models, "list the supported model families")
    presets = command(
        "presets", _presets, "list the presets of `sweep` and their published numbers"
    )
    presets.add_argument(
        "name", nargs="?", metavar="NAME", help="show the numbers that this one holds"
    )
    where = command("where", _where, "print where the embedded model and benchmark are")
    where.add_argument(
        "what",
        choices=("model", "data", "tasks", "task-name", "words"),
        help="folders of the embedded model, of its data, of our tasks for lmms-eval's "
        "--include_path; or the name of the embedded benchmark among these tasks, or the words "
        "that the embedded model knows",
    )
    return parser


def sweep_parser() -> argparse.ArgumentParser:
    """The arguments of the sweep command alone."""
    parser = _Parser(prog="vlmprune sweep")
    _verbosity_argument(parser, "WARNING")
    _sweep_arguments(parser)
    return parser


# --- Arguments -------------------------------------------------------------------------------


def _verbosity_argument(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--verbosity",
        type=str.upper,
        choices=("DEBUG", "INFO", "WARNING", "ERROR"),
        default=default,
        help="log level on stderr; DEBUG shows tracebacks (default: WARNING)",
    )


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", default="embedded", metavar="DIR_OR_NAME", help="default: the embedded model"
    )
    group.add_argument(
        "--device",
        help="cpu, cuda, cuda:1, or auto: spread a large model over all accelerators, memory and "
        "disk (default: cuda if there is one)",
    )
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on the CPU, else the checkpoint's own (default: auto)",
    )
    group.add_argument(
        "--attn_implementation", metavar="NAME", help="sdpa, eager, ... (default: transformers')"
    )
    group.add_argument(
        "--model_args",
        metavar="KEY=VALUE,...",
        help="how model and processor are loaded: revision, trust_remote_code, and for the Qwen "
        "families min_pixels and max_pixels of a picture",
    )
    group.add_argument(
        "--clip",
        metavar="DIR_OR_NAME",
        help="the CLIP checkpoint of the model's vision tower, for methods that read its text "
        "encoder (cdpruner)",
    )


def _import_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--import",
        dest="imports",
        nargs="+",
        default=[],
        metavar="FILE",
        help="files (mine.py) or installed modules that register methods of your own",
    )


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "name",
        metavar="NAME",
        help="name or name:field=value of a method, or a file (mine.py) that registers some",
    )
    parser.add_argument(
        "--layouts", nargs="+", default=[], metavar="LAYOUT", help="some of them (default: all)"
    )
    _import_argument(parser)


def _new_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="of the method, in lower case: my_method")
    parser.add_argument(
        "--place",
        required=True,
        choices=("before_llm", "decoder", "cache"),
        help="where it acts: before the LLM, between decoder layers, on the KV cache",
    )
    parser.add_argument(
        "--output_path", "-o", metavar="FILE", help="a file that is not there (default: NAME.py)"
    )


def _positions_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--positions",
        choices=("original", "repacked"),
        help="rotary positions after a cut (default: the one of each method's paper)",
    )


def _sweep_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings given elsewhere; flags typed here go before them")
    group.add_argument(
        "--preset",
        metavar="NAME",
        help="a grid of the literature, whole or in part: see `vlmprune presets`",
    )
    group.add_argument(
        "--config",
        metavar="FILE",
        help="YAML with flags as keys; goes before the preset. A sweep writes its own as "
        "sweep.yaml into its folder",
    )
    group = parser.add_argument_group("grid")
    group.add_argument(
        "--methods",
        nargs="+",
        default=list(DEFAULT_METHODS),
        metavar="NAME",
        help=f"names, with commas or spaces; {_METHOD_WORD}; dense is always run, first "
        f"(default: {','.join(DEFAULT_METHODS)})",
    )
    group.add_argument(
        "--budgets",
        nargs="+",
        default=list(DEFAULT_BUDGETS),
        metavar="BUDGET",
        help=f"for methods without one of their own; {_BUDGET_WORD} (default: "
        f"{','.join(DEFAULT_BUDGETS)})",
    )
    _import_argument(group)
    _positions_argument(group)
    group = parser.add_argument_group("evaluation")
    group.add_argument(
        "--tasks",
        nargs="+",
        default=[],
        metavar="TASK",
        help="with commas or spaces: tinyscenes, the embedded benchmark, or any task of lmms-eval "
        "(default: tinyscenes)",
    )
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="FILE",
        help="your own questions instead: JSON lines with image (a path, relative to the file), "
        "question, answer or answers, and if you like choices, kind, matching, id",
    )
    group.add_argument(
        "--matching",
        choices=("exact", "contains", "number", "choice"),
        default="exact",
        help="how answers to --data are compared, where a line does not say: exact, but for case, "
        "spaces and punctuation; contains: the answer's words stand in what was said; number: the "
        "first number, rounded to the answer's decimals; choice: an option's letter or text "
        "(default: exact, and choice for lines with choices)",
    )
    group.add_argument(
        "--max_new_tokens",
        type=_positive,
        default=32,
        metavar="N",
        help="length of answers to --data at most (default: 32)",
    )
    group.add_argument(
        "--include_path", metavar="DIR", help="a folder with further tasks of lmms-eval"
    )
    group.add_argument(
        "--limit",
        type=_limit,
        default=500,
        metavar="N|all",
        help="questions, every kind represented (default: 500; all of --data)",
    )
    group.add_argument(
        "--kinds",
        nargs="+",
        metavar="KIND",
        help="only questions of these kinds, with commas or spaces (default: all kinds)",
    )
    group.add_argument("--batch_size", "-b", type=_positive, default=32, help="default: 32")
    group.add_argument(
        "--seed", type=int, default=0, help="of torch and of every method that has one (default: 0)"
    )
    group.add_argument(
        "--output_path",
        "-o",
        default="./vlmprune_runs",
        metavar="DIR",
        help="for runs.jsonl, tables and pictures (default: ./vlmprune_runs)",
    )
    group.add_argument(
        "--log_samples", "-s", action="store_true", help="also write every answer to samples/"
    )
    group.add_argument(
        "--rerun", action="store_true", help="measure again what the folder has already"
    )
    _model_arguments(parser)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="RUNS", help="files runs.jsonl, or the folders they are in"
    )
    parser.add_argument(
        "--output_path",
        "-o",
        metavar="OUT",
        help="ends on .html, .md, .csv or .tex; a folder for lm-eval's files (default: Markdown to "
        "stdout)",
    )
    parser.add_argument(
        "--format",
        choices=("html", "markdown", "csv", "latex", "lm-eval"),
        help="whatever OUT ends on",
    )
    parser.add_argument(
        "--examples",
        type=_count,
        metavar="N",
        help="questions of every task that are shown, with pictures (default: all recorded)",
    )


def _ask_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", metavar="IMAGE", help="a picture, or embedded:N for one of the embedded benchmark"
    )
    parser.add_argument(
        "question", metavar="QUESTION", nargs="?", help="may be left out with embedded:N"
    )
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--method",
        required=True,
        action="append",
        metavar="NAME",
        help=f"see `vlmprune methods`; {_METHOD_WORD}. Given several times: as `vlmprune compare`",
    )
    group.add_argument(
        "--method_args", metavar="FIELD=VALUE,...", help="fields of the method, e.g. layer=3"
    )
    _budget_arguments(group)
    _import_argument(group)
    _positions_argument(group)
    _answer_arguments(parser)
    _model_arguments(parser)


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "%(prog)s IMAGE [IMAGE ...] QUESTION --methods NAME [NAME ...] [options]"
    parser.add_argument(
        "images",
        nargs="+",
        metavar="IMAGE",
        help="pictures, each of which is asked about, or embedded:N for one of the embedded "
        "benchmark; behind them the QUESTION, which may be left out with embedded:N",
    )
    group = parser.add_argument_group("pruning")
    group.add_argument(
        "--methods",
        required=True,
        nargs="+",
        metavar="NAME",
        help=f"names, with commas or spaces; {_METHOD_WORD}; dense is always asked, first",
    )
    budget = _budget_arguments(group)
    budget.add_argument(
        "--budgets", nargs="+", default=[], metavar="BUDGET", help=f"several; {_BUDGET_WORD}"
    )
    _import_argument(group)
    _positions_argument(group)
    parser.add_argument(
        "--answer", default="", metavar="TEXT", help="the right one: answers become green or red"
    )
    parser.add_argument(
        "--repeats", type=_positive, default=3, help="times that each is timed (default: 3)"
    )
    _answer_arguments(parser)
    _model_arguments(parser)


def _budget_arguments(group: argparse._ArgumentGroup) -> argparse._MutuallyExclusiveGroup:
    budget = group.add_mutually_exclusive_group()
    budget.add_argument("--keep_ratio", type=float, metavar="X", help="share of the tokens kept")
    budget.add_argument("--keep_tokens", type=int, metavar="N", help="tokens kept per image")
    budget.add_argument("--average_tokens", type=float, metavar="N", help="mean per decoder layer")
    budget.add_argument("--flops_ratio", type=float, metavar="X", help="share of dense FLOPs")
    return budget


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--save", metavar="FILE", help="write the picture of the kept tokens here")
    parser.add_argument("--max_new_tokens", type=_positive, default=32, help="default: 32")


def _bench_commands(parser: argparse.ArgumentParser) -> None:
    whats = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    for what, arguments, run, text in (
        (
            "model",
            _bench_model_arguments,
            _bench,
            "dense, oracle and patched runs of a model, in turn",
        ),
        (
            "select",
            _bench_select_arguments,
            _bench_select,
            "choosing alone, beside a plain transcription of each method's official steps",
        ),
        (
            "scale",
            _bench_scale_arguments,
            _bench_scale,
            "how time and memory of choosing grow with the number of visual tokens",
        ),
    ):
        sub = whats.add_parser(what, help=text, description=text[0].upper() + text[1:] + ".")
        arguments(sub)
        _import_argument(sub)
        _verbosity_argument(sub, argparse.SUPPRESS)
        sub.set_defaults(run=run)


def _bench_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["divprune", "vtc_cls", "fastv"],
        metavar="NAME",
        help=f"{_METHOD_WORD} (default: divprune,vtc_cls,fastv)",
    )
    parser.add_argument(
        "--budgets",
        nargs="+",
        default=list(DEFAULT_BUDGETS),
        metavar="BUDGET",
        help=f"{_BUDGET_WORD} (default: {','.join(DEFAULT_BUDGETS)})",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--shape",
        metavar="NAME",
        help="sizes of a published model with random weights, or a small one of its family: "
        "llava-1.5-7b, llava-1.5-13b, llava-next-7b, llava-onevision-7b, qwen2.5-vl-7b, "
        "qwen3-vl-8b, llava-small, llava-next-small, llava-onevision-small, qwen2.5-vl-small, "
        "qwen3-vl-small (default: a LLaVA of --layers, --width and --tokens)",
    )
    which.add_argument("--model", metavar="DIR_OR_NAME", help="a checkpoint instead")
    parser.add_argument(
        "--picture",
        type=_picture,
        metavar="HxW",
        help="its height and width in pixels (default: what is usual for the model)",
    )
    parser.add_argument(
        "--image", metavar="FILE", help="a picture for --model (default: noise of --picture)"
    )
    parser.add_argument(
        "--batch_size", "-b", type=_positive, default=1, help="prompts at once (default: 1)"
    )
    parser.add_argument(
        "--ragged",
        action="store_true",
        help="prompts of unequal length, so that all but the longest are padded",
    )
    parser.add_argument(
        "--meta",
        action="store_true",
        help="run nothing: FLOPs and bytes from sizes alone (what happens anyway where a shape "
        "does not fit)",
    )
    parser.add_argument("--layers", type=_positive, default=12, help="of the decoder (default: 12)")
    parser.add_argument(
        "--width",
        type=_positive,
        default=1024,
        help="of the decoder, a multiple of 64 (default: 1024)",
    )
    parser.add_argument(
        "--tokens", type=_positive, default=576, help="visual tokens, a square (default: 576)"
    )
    parser.add_argument("--repeats", type=_positive, default=5, help="rounds (default: 5)")
    parser.add_argument(
        "--new_tokens", type=_positive, default=32, metavar="N", help="decoded (default: 32)"
    )
    parser.add_argument(
        "--memory",
        action="store_true",
        help="also measure peak memory on the CPU, in a process of its own for every variant "
        "(CUDA's allocator tells without)",
    )
    parser.add_argument("--device", help="cpu, cuda (default: cuda if there is one)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="auto: float32 on the CPU, else bfloat16, also where nothing is run (default: auto)",
    )
    parser.add_argument(
        "--attn_implementation", default="sdpa", metavar="NAME", help="default: sdpa"
    )
    parser.add_argument(
        "--output_path", "-o", metavar="FILE", help="also write the numbers as JSON"
    )


def _bench_select_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods", nargs="+", default=[], metavar="NAME", help="default: all before the LLM"
    )
    parser.add_argument(
        "--tokens",
        type=_positives,
        default=[576, 2880],
        metavar="N,...",
        help="visual tokens of an image, tiles of 576 (default: 576,2880)",
    )
    parser.add_argument(
        "--batch", type=_positives, default=[1, 8], metavar="N,...", help="images (default: 1,8)"
    )
    parser.add_argument(
        "--rounds", type=_positive, default=5, help="after one that warms up (default: 5)"
    )
    parser.add_argument("--threads", type=_positive, help="of torch (default: torch's)")
    parser.add_argument(
        "--width", type=_positive, default=4096, help="of the LLM's features (default: 4096)"
    )
    parser.add_argument(
        "--output_path", "-o", metavar="FILE", help="also write the numbers as JSON"
    )


def _bench_scale_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=[], metavar="NAME", help="default: all")
    parser.add_argument(
        "--tokens",
        type=_positives,
        default=[256, 1024, 4096, 16384],
        metavar="N,...",
        help="visual tokens, squares (default: 256,1024,4096,16384)",
    )
    parser.add_argument(
        "--rounds",
        type=_positive,
        default=3,
        help="after one that warms up; a round of more than 3 s is measured once (default: 3)",
    )
    parser.add_argument(
        "--limit",
        type=_positive,
        default=60,
        metavar="SECONDS",
        help="leave out sizes of which one round is expected to take longer (default: 60)",
    )
    parser.add_argument(
        "--output_path", "-o", metavar="FILE", help="also write the numbers as JSON"
    )


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _picture(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    try:
        return _positive(height), _positive(width)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a height and a width in pixels: write e.g. 672x672"
        ) from None


def _positives(text: str) -> list[int]:
    return [_positive(word) for word in split_list([text])]


def _limit(text: str) -> int | None:
    if text == "all":
        return None
    try:
        return _positive(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a number of questions (at least 1) nor all"
        ) from None


# --- Commands --------------------------------------------------------------------------------


def _check(args: argparse.Namespace) -> None:
    """Refuse what is wrong at first sight, with nothing heavy imported; read what is asked."""
    from .commands import early

    words = split_list([*getattr(args, "methods", []), *getattr(args, "method", [])])
    if args.command == "methods" and args.name:
        words = [args.name]
    early.refuse_unknown_methods(words)
    early.refuse_unknown_budgets(split_list(getattr(args, "budgets", [])))
    if args.command == "sweep":
        early.refuse_unknown_questions(
            split_list(args.tasks), split_list(args.kinds or []), other_tasks=bool(args.data)
        )
        early.refuse_unwritable(args.output_path)
        from .tasks.jsonl import read_all

        args.own = read_all(args.data, matching=args.matching, max_new_tokens=args.max_new_tokens)
    elif args.command == "ask":
        from .compare.asked import check_save, read_asked

        check_save(args.save)
        args.asked = read_asked(args.image, args.question)
    elif args.command == "compare":
        from .compare.asked import check_save, read_all_asked

        check_save(args.save)
        args.asked = read_all_asked(args.images, args.answer)


def _sweep(args: argparse.Namespace) -> int:
    from .commands.config import resolved
    from .commands.sweep import run

    return run(
        own=args.own,
        settings=resolved(sweep_parser(), args),
        methods=split_list(args.methods),
        budgets=split_list(args.budgets),
        positions=args.positions,
        limit=args.limit,
        kinds=split_list(args.kinds or []),
        tasks=split_list(args.tasks),
        include_path=args.include_path,
        model_args=parse_fields(split_list([args.model_args or ""])),
        batch_size=args.batch_size,
        seed=args.seed,
        output_path=args.output_path,
        log_samples=args.log_samples,
        rerun=args.rerun,
        model_name=args.model,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        clip=args.clip,
    )


def _report(args: argparse.Namespace) -> int:
    from .commands.report import run

    return run(runs=args.runs, output=args.output_path, format=args.format, examples=args.examples)


def _ask(args: argparse.Namespace) -> int:
    from .commands.ask import run

    return run(
        asked=args.asked,
        methods=args.method,
        method_args=split_list([args.method_args or ""]),
        budget=_budget(args),
        positions=args.positions,
        save=args.save,
        max_new_tokens=args.max_new_tokens,
        model=_model(args),
    )


def _compare(args: argparse.Namespace) -> int:
    from .commands.compare import run

    return run(
        asked=args.asked,
        methods=split_list(args.methods),
        budget=_budget(args),
        budgets=split_list(args.budgets),
        positions=args.positions,
        save=args.save,
        max_new_tokens=args.max_new_tokens,
        repeats=args.repeats,
        model=_model(args),
    )


def _budget(args: argparse.Namespace) -> dict[str, float]:
    words = ("keep_ratio", "keep_tokens", "average_tokens", "flops_ratio")
    return {word: getattr(args, word) for word in words if getattr(args, word) is not None}


def _model(args: argparse.Namespace) -> ModelFlags:
    from .commands.comparing import ModelFlags

    return ModelFlags(
        name=args.model,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        model_args=parse_fields(split_list([args.model_args or ""])),
        clip=args.clip,
    )


def _bench(args: argparse.Namespace) -> int:
    from .commands.bench import run

    return run(
        methods=split_list(args.methods),
        budgets=split_list(args.budgets),
        shape_name=args.shape,
        model_name=args.model,
        picture=args.picture,
        image=args.image,
        layers=args.layers,
        width=args.width,
        tokens=args.tokens,
        batch_size=args.batch_size,
        ragged=args.ragged,
        meta=args.meta,
        repeats=args.repeats,
        new_tokens=args.new_tokens,
        memory=args.memory,
        device=args.device,
        dtype=args.dtype,
        attn_implementation=args.attn_implementation,
        output_path=args.output_path,
    )


def _bench_select(args: argparse.Namespace) -> int:
    from .bench.select import run

    return run(
        methods=split_list(args.methods),
        tokens=args.tokens,
        batches=args.batch,
        rounds=args.rounds,
        threads=args.threads,
        width=args.width,
        output_path=args.output_path,
    )


def _bench_scale(args: argparse.Namespace) -> int:
    from .bench.scale import run

    return run(
        methods=split_list(args.methods),
        tokens=args.tokens,
        rounds=args.rounds,
        limit=args.limit,
        output_path=args.output_path,
    )


def _check_method(args: argparse.Namespace) -> int:
    from .commands.check_method import run

    return run(method=args.name, layouts=split_list(args.layouts))


def _new_method(args: argparse.Namespace) -> int:
    from .commands.new_method import run

    return run(name=args.name, place=args.place, output_path=args.output_path)


def _methods(args: argparse.Namespace) -> int:
    from .commands.listing import methods_table
    from .console import stdout

    console = stdout()
    if args.name:
        from .commands.method_page import method_page

        width = min(console.width, _PAGE_WIDTH) if console.is_terminal else _PAGE_WIDTH
        console.print(method_page(args.name, width), markup=False)
    else:
        methods_table().print(console)
    return 0


def _presets(args: argparse.Namespace) -> int:
    from .commands.presets import presets_table, published_table
    from .console import stdout

    (published_table(args.name) if args.name else presets_table()).print(stdout())
    return 0


def _models(args: argparse.Namespace) -> int:
    from .commands.listing import models_table
    from .console import stdout

    models_table().print(stdout())
    return 0


def _where(args: argparse.Namespace) -> int:
    from . import embedded
    from .console import stdout
    from .embedded.vocabulary import KNOWN_WORDS
    from .tasks import TASKS_DIR

    found = {
        "model": embedded.MODEL_DIR,
        "data": embedded.DATA_DIR,
        "tasks": TASKS_DIR,
        "task-name": embedded.TASK,
        "words": " ".join(sorted(KNOWN_WORDS)),
    }
    stdout().print(str(found[args.what]), markup=False)
    return 0
