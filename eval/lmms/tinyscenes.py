"""The embedded benchmark as a task of lmms-eval: what `eval/tasks/tinyscenes` names."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ..embedded import questions
from ..embedded.task import EmbeddedTask

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

Doc = dict[str, Any]


def process_docs(scenes: Dataset) -> Dataset:
    """One row a question, in the order of the benchmark; pictures are drawn when they are asked
    for."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "id": question.id,
                "image_id": question.image_id,
                "kind": question.kind,
                "question": question.question,
                "answer": question.answer,
            }
            for question in questions()
        ]
    )


def doc_to_visual(doc: Doc) -> list[Image]:
    from PIL import Image

    from ..embedded.benchmark import rendered

    return [Image.fromarray(rendered(doc["image_id"]).pixels)]


def doc_to_text(doc: Doc, lmms_eval_specific_kwargs: Doc | None = None) -> str:
    return doc["question"]


def process_results(doc: Doc, results: list[str]) -> dict[str, float]:
    question: Any = SimpleNamespace(**doc)
    return {"exact_match": float(EmbeddedTask().is_correct(results[0], question))}
