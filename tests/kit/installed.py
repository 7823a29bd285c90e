"""Packages of others, installed as pip leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def install(
    folder: Path,
    package: str,
    groups: Mapping[str, Mapping[str, str]],
    source: str | None = None,
) -> None:
    """A distribution in site-packages: its metadata with entry points, group by group, and its
    module, if any."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{name} = {value}" for name, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    if source is not None:
        (folder / f"{package}.py").write_text(source)
