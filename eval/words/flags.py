"""What errors say to type, in the words of the command line.

The library's errors speak of keyword arguments, as its users in Python need it. Result files keep
them so; what a command says is translated here.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ...prune.amount import BUDGET_WORDS, PREFIXES

_BUDGET = "|".join(BUDGET_WORDS)
_NUMBER = r"\d+(?:\.\d+)?"
_KIND: dict[str, str] = {
    "keep_ratio": "a ratio (0.25)",
    "keep_tokens": "a number of tokens (64)",
    "average_tokens": "avg:64",
    "flops_ratio": "flops:0.3",
}
_NAMED = re.compile(r"\w+\([^()]*=[^()]*\)")  # a method as tables name it, fastv(layer=3)

_Rule = tuple[str, str | Callable[[re.Match[str]], str]]
_RULES: list[_Rule] = [
    (r'clip=vlmprune\.ClipText\.from_pretrained\("([^"]+)", processor\)', r"--clip \1"),
    (r"\bclip= ", "--clip "),
    (r'call model\.set_attn_implementation\("(\w+)"\)(?: first)?', r"--attn_implementation \1"),
    (r"""\bpositions=(["'])(\w+)\1""", r"--positions \2"),
    (r"\bleave positions out", "leave --positions out"),
    (rf'vlmprune\.method\("(\w+)", ({_BUDGET})=({_NUMBER})\)', lambda m: f"{m[1]}@{_word(m, 2)}"),
    (r"\bvlmprune\.(methods|models)\(\)", r"`vlmprune \1`"),
    (rf"(?<![-\w])({_BUDGET})=({_NUMBER})", lambda m: f"--budgets {_word(m, 1)}"),
    (r"""(?<![-:\w])([a-z_]+)=(?:'(\w+)'|"(\w+)"|(True|False)\b)""", lambda m: _field(m)),
]
_OWN_BUDGET_FLAGS: list[_Rule] = [
    (rf"(?<![-\w])({_BUDGET})=({_NUMBER})", r"--\1 \2"),
    (rf"(?<![-\w])({_BUDGET})\b(?!=)", r"--\1"),
]
_ONE_BUDGET_FLAG: list[_Rule] = [
    (rf"(?<![-\w])({_BUDGET})\b(?!=)", lambda m: _KIND[m[1]]),
]


def in_flags(text: str, *, budget_flags: bool = False) -> str:
    """An error's text with flags in place of keyword arguments.

    Args:
        budget_flags: the command has a flag for every budget word (`--keep_ratio 0.25`), rather
            than `--budgets` for all of them.
    """
    rules = [*_OWN_BUDGET_FLAGS, *_RULES] if budget_flags else [*_RULES, *_ONE_BUDGET_FLAG]
    names = _NAMED.findall(text)
    parts = [_translated(part, rules) for part in _NAMED.split(text)]
    return "".join(part + name for part, name in zip(parts, [*names, ""], strict=True))


def _translated(text: str, rules: list[_Rule]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _word(match: re.Match[str], at: int) -> str:
    """A budget as `--budgets` takes it."""
    return PREFIXES.get(match[at], "") + match[at + 1]


def _field(match: re.Match[str]) -> str:
    """A field as it stands behind a method's name."""
    return f":{match[1]}={match[2] or match[3] or match[4]}"
