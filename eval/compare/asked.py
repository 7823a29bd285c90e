"""What `ask` and `compare` are asked: a question typed by the user, about a picture or several.

Nothing heavy is imported, so that a missing picture is refused at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..embedded.task import EmbeddedTask
from ..image_file import InputError, read_picture
from ..tasks.protocols import Question

EMBEDDED_PREFIX = "embedded:"


@dataclass(frozen=True)
class Asked:
    """A `Question` typed by the user; `answer` is empty where nobody knows it."""

    question: str
    image: Image.Image
    answer: str = ""
    kind: str = ""
    id: str = "asked"


def read_asked(image: str, question: str | None, answer: str = "") -> Question:
    """A picture's file, or `embedded:N`, and the question about it, which the latter has.

    Raises:
        InputError: one of them is missing or cannot be read.
    """
    if image.startswith(EMBEDDED_PREFIX):
        questions = EmbeddedTask().questions(None)
        number = image.removeprefix(EMBEDDED_PREFIX)
        if not number.isdecimal() or int(number) >= len(questions):
            raise InputError(
                f"{image!r} is no question of the embedded benchmark: use embedded:0 to "
                f"embedded:{len(questions) - 1}."
            )
        found = questions[int(number)]
        if not question and not answer:
            return found
        return Asked(question or found.question, found.image, answer)
    picture = read_picture(image)
    if not question or not question.strip():
        raise InputError('No QUESTION given: write it behind the picture, "What is on the table?".')
    return Asked(question, picture, answer)


def read_all_asked(words: Sequence[str], answer: str = "") -> dict[str, Question]:
    """The question about each picture, by what was typed: pictures, and behind them the question,
    which may be left out where all are of the embedded benchmark."""
    asks = not all(word.startswith(EMBEDDED_PREFIX) for word in words)
    if asks and len(words) == 1:
        return {words[0]: read_asked(words[0], None)}
    images, question = (words[:-1], words[-1]) if asks else (words, None)
    if question is not None and Path(question).is_file():
        raise InputError(f"No QUESTION behind the pictures: {question!r} is a file.")
    return {image: read_asked(image, question, answer) for image in images}


def check_save(save: str | None) -> None:
    """Refuse a file that no picture can be written to before any work is done.

    Raises:
        InputError: it has no suffix of a picture, or its folder is not there.
    """
    if save is None:
        return
    path = Path(save)
    Image.init()
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise InputError(f"--save {save!r} has no suffix of a picture: write for example kept.png.")
    if not path.parent.is_dir():
        raise InputError(f"--save {save!r}: the folder {str(path.parent)!r} does not exist.")


def save_picture(picture: Image.Image, save: str, legend: Sequence[str] = ()) -> None:
    """Write the picture of what was kept, and say where it is and what its colours mean.

    Raises:
        InputError: it cannot be written.
    """
    try:
        picture.save(save)
    except OSError as error:
        raise InputError(f"--save {save!r}: {error.strerror or error}.") from error
    sys.stderr.write("\n".join([f"kept tokens: {save}", *legend]) + "\n")
