"""The tiny models of all families, by their names."""

from __future__ import annotations

from ..models.registry import eval_family, known_families

CASES = {
    case.name: case
    for name in known_families()
    for case in eval_family(name, "No tiny model is known").tiny
}
