"""Command line of the training: `vision`, `language`, `export`; `head` for the classifier;
`language --places` for the model that says where things are."""

import argparse
from pathlib import Path

import torch

VISION_STEPS, LANGUAGE_STEPS = 3200, 1900


def main() -> None:
    """Parse and run one stage."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.eval.embedded.training")
    parser.add_argument("stage", choices=("vision", "language", "export", "head"))
    parser.add_argument("--out", type=Path, help="folder of the checkpoints (not of head)")
    parser.add_argument("--steps", type=int, help="length of the schedule")
    parser.add_argument("--stop", type=int, help="end after this many steps, to resume later")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (1 is best on a shared machine)")
    parser.add_argument("--workers", type=int, default=1, help="processes that render scenes")
    parser.add_argument("--control", action="store_true", help="language: teach no looks")
    parser.add_argument(
        "--places",
        action="store_true",
        help="language, export: go on from the shipped model and teach it `where`",
    )
    parser.add_argument("--tune-from", type=int, help="language: tune the tower too from here")
    parser.add_argument("--snapshots", type=int, nargs="*", default=(), help="steps to keep")
    parser.add_argument("--name", help="checkpoint's name in --out (language, export)")
    parser.add_argument("--model", type=Path, help="export: folder of the exported model")
    args = parser.parse_args()
    if args.out is None and args.stage != "head":
        parser.error(f"{args.stage} needs --out")
    if args.threads:
        torch.set_num_threads(args.threads)
    run = {"device": args.device, "resume": args.resume, "workers": args.workers}
    name = args.name or ("control" if args.control else "places" if args.places else "language")
    if args.stage == "vision":
        from . import vision

        vision.train(args.out, args.steps or VISION_STEPS, stop=args.stop, **run)
    elif args.stage == "language":
        from . import language, places

        language.train(
            args.out,
            args.steps or (places.STEPS if args.places else LANGUAGE_STEPS),
            stop=args.stop,
            course=places.COURSE if args.places else language.FIRST_COURSE,
            look=not args.control,
            tune_from=args.tune_from,
            snapshots=tuple(args.snapshots),
            name=name,
            **run,
        )
    elif args.stage == "head":
        from . import head

        head.train()
    else:
        from .. import EMBEDDED, MODELS, WHERE_MODEL
        from . import export

        folder = MODELS[WHERE_MODEL if args.places else EMBEDDED]
        export.export(args.out / f"{name}.pt", args.model or folder)


if __name__ == "__main__":
    main()
