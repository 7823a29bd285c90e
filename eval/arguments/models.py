"""`vlmprune models`, which has no arguments."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

HELP = "list the supported model families"
EXAMPLES = None


@dataclass(frozen=True)
class ModelsRequest:
    """All of them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None."""


def request(args: argparse.Namespace) -> ModelsRequest:
    return ModelsRequest()
