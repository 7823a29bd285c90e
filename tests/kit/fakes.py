"""A task and a processor over the zoo's letters: evaluation without files and tokenizers."""

from __future__ import annotations

from dataclasses import dataclass

from kit.zoo import Case
from PIL import Image


@dataclass(frozen=True)
class Asked:
    """A question whose picture is a letter of the zoo."""

    id: int
    kind: str
    question: str
    answer: str
    image: Image.Image


def picture(letter: str) -> Image.Image:
    """Stands for an image of the zoo; its colour tells which."""
    return Image.new("RGB", (40, 30), ("ABC".index(letter), 0, 0))


class FakeTask:
    """Prompts of different lengths over the zoo's images; the right answer is the dense model's."""

    name, version, max_new_tokens = "fake", "1", 3

    def __init__(self, answers: list[str] | None = None) -> None:
        self.answers = answers or [""] * 6

    def questions(self, limit: int | None) -> list[Asked]:
        kinds = ("long", "short")
        return [
            Asked(i, kinds[i % 2], f"question {i}", self.answers[i], picture("ABC"[i % 3]))
            for i in range(6)
        ][:limit]

    def prompt(self, processor, question):
        return question

    def is_correct(self, prediction, question):
        return prediction == question.answer


class FakeProcessor:
    """Turns the zoo's rows into model inputs, as a real processor does with text and pictures."""

    def __init__(self, case: Case) -> None:
        self.case = case

    def __call__(self, text, images, **options):
        assert options["padding_side"] == "left"
        words = {"long": 9, "short": 4}
        letters = ["ABC"[image.getpixel((0, 0))[0]] for (image,) in images]  # one of each prompt
        rows = [(words[q.kind], letter, 2) for q, letter in zip(text, letters, strict=True)]
        return self.case.inputs(rows)

    def batch_decode(self, rows, **_):
        return [" ".join(str(token) for token in row) for row in rows.tolist()]
