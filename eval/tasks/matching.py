"""Whether what a model said is the right answer: `exact`, `contains`, `number` or `choice`.

exact     equal, but for case, spaces and punctuation
contains  the answer's words stand in the prediction, next to each other and whole ("cat" is in
          "A black cat." but not in "concatenate")
number    the first number of the prediction, rounded to as many decimals as the answer is written
          with (halves away from zero), is the answer: where that is 3.14, 3.1415 is right and 3.1
          is not. 1,234 is one number; zero to twelve may be words where there are no digits
choice    the option's letter or its text: "B", "(b)", "B. a dog", "The answer is B", "It is a dog"
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from decimal import ROUND_HALF_UP, Context, Decimal
from typing import Literal, get_args

from .questions import normalise

Matching = Literal["exact", "contains", "number", "choice"]
MATCHINGS: tuple[Matching, ...] = get_args(Matching)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_NUMBER = re.compile(
    r"(?:(?<![\w.])[-+])?(?:(?<![\d.])(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"(?:e[-+]?\d{1,3}(?!\w))?"
)
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six"),
    *("seven", "eight", "nine", "ten", "eleven", "twelve"),
)
_ROUNDING = Context(prec=1000, rounding=ROUND_HALF_UP, traps=[])
_NO_SPACES = re.compile("[\u3040-\u30ff\u3400-\u9fff]")  # Chinese, Japanese: each sign is a word


def words(text: str) -> list[str]:
    """Lower-case words without punctuation, which may be none."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return normalise(_NO_SPACES.sub(r" \g<0> ", plain)).split()


def number(text: str) -> Decimal | None:
    """The first number of a text, if there is one."""
    plain = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-").lower()
    if found := _NUMBER.search(plain):
        return Decimal(found[0].replace(",", ""))
    return next((Decimal(_NUMBER_WORDS.index(w)) for w in words(text) if w in _NUMBER_WORDS), None)


def chosen(prediction: str, choices: Sequence[str]) -> int | None:
    """The option that a prediction names; None where it names none, or it is not clear which.

    A text goes before a letter, as an option may be a letter itself.
    """
    options = [words(choice) for choice in choices]
    said = words(prediction)
    whole = [choice.strip().casefold() for choice in choices]
    if whole.count(prediction.strip().casefold()) == 1:
        return whole.index(prediction.strip().casefold())
    if said and options.count(said) == 1:
        return options.index(said)
    letters = LETTERS[: len(choices)]
    for pattern in (
        rf"(?is)\W*([{letters}])\W*",  # the letter alone, or in front of a text
        rf"(?is)\W*([{letters}])\s*[.:)\]](?!\w).*",
        rf"(?is).*\b(?:answer|option|choice)(?:\s+is)?\W*([{letters}])\b\W*",
        rf"(?s).*\b(?i:answer|option|choice)(?i:\s+is)?\W*([{letters}])\b.*",
        rf"(?s)[^(\[]*[(\[]([{letters}])[)\]].*",
    ):
        if found := re.fullmatch(pattern, prediction):
            return letters.index(found[1].upper())
    held = [option for option in options if option and _holds(said, option)]
    named = [option for option in held if sum(_holds(other, option) for other in held) == 1]
    return options.index(named[0]) if len(named) == 1 else None


def is_right(
    prediction: str, answers: Sequence[str], matching: Matching, choices: Sequence[str] = ()
) -> bool:
    """Whether a prediction is one of the right answers.

    Args:
        choices: the options, for `choice`; the answers are texts of some of them.
    """
    if matching == "choice":
        option = chosen(prediction, choices)
        return option is not None and choices[option] in answers
    if matching == "number":
        found = number(prediction)
        return found is not None and any(_rounds_to(found, answer) for answer in answers)
    said = words(prediction)
    if matching == "contains":
        return any(_holds(said, words(answer)) for answer in answers)
    return any(said == words(answer) for answer in answers)


def _holds(text: Sequence[str], part: Sequence[str]) -> bool:
    """Whether all words of `part` follow each other in `text`."""
    width = len(part)
    return any(text[at : at + width] == part for at in range(len(text) - width + 1))


def _rounds_to(found: Decimal, answer: str) -> bool:
    right = number(answer)
    if right is None:
        return False
    places = min(0, int(right.as_tuple().exponent))
    return _ROUNDING.quantize(found, Decimal(1).scaleb(places)) == right
