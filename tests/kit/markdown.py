"""The Markdown files of the repository, read as far as the tests of documents need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kit.paths import ROOT

_ROOMS = ("prune", "adapters", "eval", "tests", "notebooks")
_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^>]+) -->\n)?```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.M | re.S
)
_GENERATED = re.compile(r"<!-- generated: (\w+) -->\n(.*?)<!-- end -->", re.S)
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_PATH = re.compile(r"`([\w.\-]+(?:/[\w.\-*<>]+)*(?:/|\.(?:py|md|npz|json|jsonl|yaml|toml|cff)))`")


@dataclass(frozen=True)
class Fence:
    """A block of code: `kind` is the word behind its backticks, `mark` the comment before it."""

    kind: str
    code: str
    mark: str | None
    line: int


@dataclass(frozen=True)
class Page:
    """One Markdown file."""

    path: Path

    def __str__(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def fences(self) -> list[Fence]:
        return [
            Fence(m["kind"], m["code"], m["mark"], self.text.count("\n", 0, m.start("code")) + 1)
            for m in _FENCE.finditer(self.text)
        ]

    @property
    def tables(self) -> dict[str, str]:
        """What is between the markers of generated tables."""
        return {name: table.strip() for name, table in _GENERATED.findall(self.text)}

    def with_tables(self, tables: dict[str, str]) -> str:
        """The text, with those of the tables that it holds renewed."""
        return _GENERATED.sub(
            lambda m: f"<!-- generated: {m[1]} -->\n{tables[m[1]].strip()}\n<!-- end -->", self.text
        )

    @cached_property
    def unfenced(self) -> str:
        """The text with all code left out, its lines kept."""
        return _FENCE.sub(lambda m: "\n" * m[0].count("\n"), self.text)

    def prose(self) -> Iterator[tuple[int, str]]:
        """Numbered lines that people wrote as text: no code, no table, nothing generated."""
        written = _GENERATED.sub(lambda m: "\n" * m[0].count("\n"), self.unfenced)
        for number, line in enumerate(written.splitlines(), start=1):
            if not line.startswith("|"):
                yield number, line

    @property
    def links(self) -> list[str]:
        return _LINK.findall(self.unfenced)

    @property
    def paths(self) -> list[str]:
        """Files and folders that the text names in backticks, with a slash; tables are left out,
        whose files may be those of other repositories."""
        found = _PATH.findall("\n".join(line for _, line in self.prose()))
        return [path for path in found if "/" in path and "<" not in path]

    @property
    def anchors(self) -> set[str]:
        """What a link may name behind `#`, as GitHub makes it of headings."""
        headings = re.findall(r"^#+ (.+)$", self.unfenced, re.M)
        return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def pages() -> list[Page]:
    """All of them: those of the root, then each room's."""
    found = sorted(ROOT.glob("[A-Z]*.md"))
    for room in _ROOMS:
        found += sorted((ROOT / room).rglob("*.md"))
    return [Page(path) for path in found]
