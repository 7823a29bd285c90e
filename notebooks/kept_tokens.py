"""Draws the README's picture: `python kept_tokens.py images/kept_tokens.png [QUESTION]`."""

import sys

import vlmprune
from vlmprune.eval import embedded

METHODS = ("random", "divprune", "vtc_cls", "hiprune", "fastv")
KEEP = 0.2


def main(path: str, number: int) -> None:
    model, processor = embedded.load_model()
    question = embedded.questions()[number]
    compared = vlmprune.compare(
        model,
        processor,
        question.image,
        question.question,
        METHODS,
        keep_ratio=KEEP,
        answer=question.answer,
        max_new_tokens=8,
        repeats=1,
    )
    compared.picture().quantize(128).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 18)
