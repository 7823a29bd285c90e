"""What can be refused before torch is imported: methods that nobody has."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from importlib.metadata import entry_points
from pathlib import Path

from ..prune import methods
from ..prune.errors import UnknownMethodError, did_you_mean

DENSE = "dense"
AND = re.compile(r"\+(?=[A-Za-z_])")  # the plus of 1e+3 is none


def refuse_unknown_methods(words: Iterable[str]) -> None:
    """Look at the names alone in words such as "divprune@0.5+fastv:layer=3".

    Raises:
        UnknownMethodError: it says what is near, and what there is.
    """
    names = [re.split("[:@]", part)[0] for word in words for part in AND.split(word)]
    if not names:
        return
    known = _known()
    for name in names:
        if name not in known and name != DENSE:
            raise UnknownMethodError(f"Unknown method {name!r}. {did_you_mean(name, known)}")


def _known() -> list[str]:
    """As `registry.method_names`, which also has those that were registered in this process."""
    registry = sys.modules.get(f"{methods.__package__.rpartition('.')[0]}.registry")
    if registry is not None:
        found: list[str] = registry.method_names()
        return found
    files = Path(str(methods.__file__)).parent.glob("*/*.py")
    shipped = {path.stem for path in files if path.stem != "__init__"}
    return sorted(shipped | entry_points(group="vlmprune.methods").names)
