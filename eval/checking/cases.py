"""The tiny models of all families, by their names."""

from __future__ import annotations

from ..models.registry import all_families

CASES = {case.name: case for family in all_families() for case in family.tiny}
