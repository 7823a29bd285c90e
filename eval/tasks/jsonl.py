"""Your own questions as a task: a file of JSON objects, one a line.

    {"image": "cats/1.jpg", "question": "How many cats are there?", "answer": "2"}
    {"image": "cats/1.jpg", "question": "What is the animal on the left?",
     "choices": ["a dog", "a cat"], "answer": "B", "kind": "left"}

image       a path, relative to the file
question    as the model is to be asked; what it should keep to ("in one word") belongs into it
answer      the right one; or answers: a list, any of which is right
choices     options, shown below the question as A., B., ...; the answer is a letter or a text
kind        what reports group by; "other" where it is missing
matching    exact, contains, number or choice: how an answer is compared (see `matching`). Lines
            without take the file's, or `choice` where they have choices
id          how result files call it; the number of the line where it is missing

Further keys are not read. The whole file is checked, pictures included, before anything runs.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from decimal import Decimal
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

from PIL import Image

from ...prune.errors import did_you_mean
from ..content_hash import content_hash
from ..image_file import InputError, check_picture, read_picture
from .matching import LETTERS, MATCHINGS, Matching, is_right, number, words
from .protocols import TaskError
from .questions import chat_prompt, in_turns

KEYS = ("image", "question", "answer", "answers", "choices", "kind", "matching", "id")
OTHER = "other"
MAX_NEW_TOKENS = 32
CHOICE_INSTRUCTION = "Answer with the option's letter from the given choices directly."
_MOST_SHOWN = 20


class DataError(TaskError):
    """Lines of a file that are no questions. `lines`: what is wrong, and with which of them.

    Symptom: `sweep --data` names lines of the file before anything runs.
    Cause: a line is no JSON object, lacks `image`, `question` or an answer, or its picture cannot
        be read.
    Type: `{"image": "a.png", "question": "What is it?", "answer": "a cat"}`, one object a line.
    Page: ERRORS.md#dataerror
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*lines)
        self.lines = lines

    def __str__(self) -> str:
        return "\n".join(self.lines)


@dataclass(frozen=True)
class FileQuestion:
    """One line. `question` is shown with its options."""

    id: str | int
    kind: str
    text: str
    answers: tuple[str, ...]
    matching: Matching
    choices: tuple[str, ...]
    path: Path

    @property
    def question(self) -> str:
        options = [f"{letter}. {text}" for letter, text in zip(LETTERS, self.choices, strict=False)]
        return "\n".join([self.text, *options])

    @property
    def answer(self) -> str:
        if self.matching != "choice":
            return " / ".join(self.answers)
        places = [self.choices.index(answer) for answer in self.answers]
        return " / ".join(f"{LETTERS[at]}. {self.choices[at]}" for at in places)

    @property
    def image(self) -> Image.Image:
        return read_picture(self.path)


class JsonlTask:
    """A `Task` of the questions in a file, for `sweep_model(task=...)`, `Evaluator` and `sweep`.

    Args:
        path: the file; see the head of this module for its lines.
        matching: how answers of lines that do not say are compared.
        max_new_tokens: length of an answer at most.

    Raises:
        DataError: every line that is no question, with its number and what is wrong with it.
    """

    def __init__(
        self,
        path: str | PathLike[str],
        *,
        matching: Matching = "exact",
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        self.path = Path(path)
        self.name = self.path.stem
        self.max_new_tokens = max_new_tokens
        self.matching = matching
        if matching not in MATCHINGS:
            raise TaskError(f"matching={matching!r}: write one of {', '.join(MATCHINGS)}.")
        lines, wrong, self.unread = _read(self.path, matching)
        self._questions = list(lines.values())
        self._hashes, without = _check_pictures(lines)
        wrong |= without
        if wrong:
            raise _error(self.path, wrong)
        if not lines:
            raise DataError(f"{self.path} holds no questions: write one JSON object a line.")

    @cached_property
    def version(self) -> str:
        """12 hex digits over all questions, their answers and pictures."""
        return content_hash(
            [
                asdict(question) | {"path": self._hashes[question.path]}
                for question in self._questions
            ]
        )

    def questions(self, limit: int | None) -> list[FileQuestion]:
        return in_turns(self._questions)[:limit]

    def prompt(self, processor: Any, question: Any) -> str:
        asks_for_letter = question.matching == "choice"
        said = [question.question, *([CHOICE_INSTRUCTION] if asks_for_letter else [])]
        return chat_prompt(processor, "\n".join(said))

    def is_correct(self, prediction: str, question: Any) -> bool:
        return is_right(prediction, question.answers, question.matching, question.choices)


def read_all(
    paths: Sequence[str], *, matching: Matching = "exact", max_new_tokens: int = MAX_NEW_TOKENS
) -> list[JsonlTask]:
    """The tasks of several files, which are known by the files' names without their endings."""
    tasks = [
        JsonlTask(path, matching=matching, max_new_tokens=max_new_tokens)
        for path in dict.fromkeys(paths)
    ]
    path_of: dict[str, Path] = {}
    for task in tasks:
        if path_of.setdefault(task.name, task.path) != task.path:
            raise TaskError(
                f"{path_of[task.name]} and {task.path} would both be called {task.name!r} in "
                f"results: rename one of them."
            )
    return tasks


# --- Reading ---------------------------------------------------------------------------------


class _Wrong(Exception):
    """What is wrong with one line."""


def _read(
    path: Path, matching: Matching
) -> tuple[dict[int, FileQuestion], dict[int, str], list[str]]:
    """Questions and what is wrong with other lines, by their numbers; keys that are not read."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{str(path)!r} cannot be read ({error.strerror}): give a file of JSON objects, one a "
            f'line, e.g. {{"image": "a.png", "question": "What is it?", "answer": "a cat"}}.'
        ) from error
    found: dict[int, FileQuestion] = {}
    wrong: dict[int, str] = {}
    unread: dict[str, None] = {}
    line_of: dict[str, int] = {}
    for at, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            given = _object(line)
            question = _question(given, at, path.parent, matching)
            first = line_of.setdefault(str(question.id), at)
            if first != at:
                raise _Wrong(f"the id {question.id!r} is that of line {first} already.")
        except _Wrong as error:
            wrong[at] = str(error)
            continue
        found[at] = question
        unread |= dict.fromkeys(key for key in given if key not in KEYS)
    return found, wrong, list(unread)


def _check_pictures(
    lines: Mapping[int, FileQuestion],
) -> tuple[dict[Path, str | InputError], dict[int, str]]:
    """The hash of every picture's file, and what is wrong with the pictures of some lines."""
    paths = list(dict.fromkeys(question.path for question in lines.values()))
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(paths, pool.map(_hash_or_error, paths), strict=True))
    wrong = {
        at: str(error)
        for at, question in lines.items()
        if isinstance(error := hashes[question.path], InputError)
    }
    return hashes, wrong


def _hash_or_error(path: Path) -> str | InputError:
    try:
        return check_picture(path)
    except InputError as error:
        return error


def _error(path: Path, wrong: Mapping[int, str]) -> DataError:
    said = [f"line {at}: {wrong[at]}" for at in sorted(wrong)]
    more = [f"and {len(said) - _MOST_SHOWN} more."] if len(said) > _MOST_SHOWN else []
    what = "1 line" if len(said) == 1 else f"{len(said)} lines"
    return DataError(f"{path}: {what} cannot be asked:", *said[:_MOST_SHOWN], *more)


# --- One line --------------------------------------------------------------------------------


def _object(line: bytes) -> dict[str, Any]:
    """A line's values by key; null stands for a key that is missing."""
    try:
        given = json.loads(line.decode(), parse_float=Decimal, object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise _Wrong(f"it is not UTF-8 (byte {error.start + 1}).") from error
    except json.JSONDecodeError as error:
        array = " Write one object a line, without [ ] around them." * line.startswith(b"[")
        raise _Wrong(f"it is no JSON: {error.msg} at column {error.colno}.{array}") from error
    if not isinstance(given, dict):
        brackets = " without [ ] around them" * isinstance(given, list)
        raise _Wrong(
            f'it is no object: write one a line{brackets}, {{"image": ..., "question": ..., '
            f'"answer": ...}}.'
        )
    return {key: value for key, value in given.items() if value is not None}


def _once(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    given = dict(pairs)
    for key in given:
        if sum(other == key for other, _ in pairs) > 1:
            raise _Wrong(f"the key {key!r} is there twice.")
    return given


def _question(given: Mapping[str, Any], at: int, folder: Path, usual: Matching) -> FileQuestion:
    missing = [key for key in KEYS if key not in given]
    for key in given:
        if key not in KEYS and (near := difflib.get_close_matches(key, missing, 1, 0.8)):
            raise _Wrong(f"unknown key {key!r}: did you mean {near[0]!r}?")
    path = _path(given, folder)
    text = _text(given, "question")
    if "<image>" in text:
        raise _Wrong("leave <image> out of the question: the model's own place for it is used.")
    choices = _choices(given)
    matching = given.get("matching", "choice" if choices else usual)
    if matching not in MATCHINGS:
        raise _Wrong(f"matching {matching!r}: {did_you_mean(str(matching), MATCHINGS)}")
    if matching == "choice" and not choices:
        raise _Wrong('matching by choice needs "choices": a list of the options.')
    known = given.get("id", at)
    if not isinstance(known, str | int) or known is True or known is False:
        raise _Wrong(f"id {known!r} is neither a text nor a whole number.")
    return FileQuestion(
        id=known,
        kind=_text(given, "kind") if "kind" in given else OTHER,
        text=text,
        answers=tuple(_checked(answer, matching, choices) for answer in _answers(given)),
        matching=matching,
        choices=choices,
        path=path,
    )


def _path(given: Mapping[str, Any], folder: Path) -> Path:
    name = _text(given, "image")
    if "://" in name:
        raise _Wrong(f"image {name!r} is an address: download it and give the file.")
    path = folder / Path(name).expanduser()
    if not path.is_file():
        raise _Wrong(f"image {name!r}: there is no file {str(path)!r}.")
    return path


def _choices(given: Mapping[str, Any]) -> tuple[str, ...]:
    listed = given.get("choices", [])
    if not isinstance(listed, list) or ("choices" in given and not 2 <= len(listed) <= 26):
        raise _Wrong('"choices" is a list of 2 to 26 options.')
    choices = tuple(_as_text(each, "choices") for each in listed)
    if len({choice.casefold() for choice in choices}) < len(choices):
        raise _Wrong("two of the choices are the same.")
    return choices


def _answers(given: Mapping[str, Any]) -> Iterator[str]:
    if ("answer" in given) == ("answers" in given):
        raise _Wrong('give "answer", or "answers" with a list of those that are right.')
    if "answer" in given:
        yield _as_text(given["answer"], "answer")
        return
    if not isinstance(given["answers"], list) or not given["answers"]:
        raise _Wrong('"answers" is a list of one or more right answers.')
    yield from (_as_text(each, "answers") for each in given["answers"])


def _checked(answer: str, matching: Matching, choices: Sequence[str]) -> str:
    """The answer, of options its text."""
    if matching == "number" and number(answer) is None:
        raise _Wrong(f"answer {answer!r} holds no number.")
    if matching in ("exact", "contains") and not words(answer):
        raise _Wrong(f"answer {answer!r} holds no letter or digit, which is what is compared.")
    if matching != "choice":
        return answer
    letters = LETTERS[: len(choices)]
    meant = {choice for choice in choices if choice.casefold() == answer.casefold()}
    if len(answer) == 1 and answer.upper() in letters:
        meant.add(choices[letters.index(answer.upper())])
    if len(meant) != 1:
        which = "is the letter of one option and the text of another" if meant else "is no option"
        raise _Wrong(f"answer {answer!r} {which}: {', '.join(choices)} (A to {letters[-1]}).")
    return meant.pop()


def _text(given: Mapping[str, Any], key: str) -> str:
    if key not in given:
        raise _Wrong(f"no {key!r}.")
    return _as_text(given[key], key)


def _as_text(value: object, key: str) -> str:
    """A text, or a number as it is written."""
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise _Wrong(f"{key!r} is a {_JSON.get(type(value), 'value')}, not a text.")
    text = str(value).strip()
    if not text:
        raise _Wrong(f"{key!r} is empty.")
    return text


_JSON: dict[type, str] = {bool: "value true or false", list: "list", dict: "object"}
