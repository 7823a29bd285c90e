"""`python -m vlmprune` is the command `vlmprune`; launchers such as torchrun start it so."""

import sys

from .eval.cli import main

if __name__ == "__main__":
    sys.exit(main())
