"""A small LLaVA that was really trained, and a benchmark in which the right tokens matter.

    model, processor = load_model()
    question = questions()[0]
    inputs = processor(images=question.image, text=prompt(processor, question.question),
                       return_tensors="pt")
    answer = processor.decode(model.generate(**inputs)[0, inputs.input_ids.shape[1]:],
                              skip_special_tokens=True)
    is_correct(answer, question.answer)

What the model can do and how it was made is in MODEL_CARD.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..tasks.questions import chat_prompt

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import LlavaForConditionalGeneration, ProcessorMixin

__all__ = [
    "DATA_DIR",
    "EMBEDDED",
    "MODELS",
    "MODEL_DIR",
    "TASK",
    "TASK_VERSION",
    "WHERE_MODEL",
    "WHERE_TASK",
    "Question",
    "is_correct",
    "load_model",
    "prompt",
    "questions",
]

MODEL_DIR = Path(__file__).parent / "model"
DATA_DIR = Path(__file__).parent / "data"
EMBEDDED, WHERE_MODEL = "embedded", "embedded-where"
MODELS = {EMBEDDED: MODEL_DIR, WHERE_MODEL: MODEL_DIR.with_name("model_where")}
"""What `--model` and `load_model` call the models that ship, and their folders."""
TASK = "tinyscenes"
TASK_VERSION = "1"
WHERE_TASK = f"{TASK}-where"  # asked with a word that only WHERE_MODEL knows


@dataclass(frozen=True)
class Question:
    """One question about one picture of the benchmark.

    `patches` are the visual tokens (0..195, in reading order) of the objects that the answer needs.
    """

    id: str
    image_id: int
    kind: str
    question: str
    answer: str
    patches: tuple[int, ...]

    @property
    def evidence(self) -> tuple[int, ...]:
        """The same on the raster on which it is measured what methods keep, which is this one."""
        return self.patches

    @property
    def image(self) -> Image:
        """The picture, 112 x 112 RGB."""
        from PIL import Image

        from .benchmark import rendered

        return Image.fromarray(rendered(self.image_id).pixels)


def questions(limit: int | None = None) -> list[Question]:
    """The benchmark, always in the same order: the kinds take turns, so that every prefix is
    balanced; `limit` takes such a prefix."""
    from .benchmark import records

    by_kind: dict[str, list[Question]] = {}
    for record in records():
        for entry in record["questions"]:
            question = Question(**fields_of(record, entry))
            by_kind.setdefault(question.kind, []).append(question)
    turns = zip(*(by_kind[kind] for kind in sorted(by_kind)), strict=True)
    return [question for turn in turns for question in turn][:limit]


def fields_of(record: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """The fields of a question, from its scene's line in a file."""
    told = {name: entry[name] for name in ("id", "kind", "question", "answer")}
    return {**told, "image_id": record["image"], "patches": tuple(entry["patches"])}


def load_model(
    dtype: Any = "float32",
    attn_implementation: str = "sdpa",
    device: Any = "cpu",
    folder: Path | None = None,
    name: str = EMBEDDED,
) -> tuple[LlavaForConditionalGeneration, ProcessorMixin]:
    """A model that ships, or that of a folder, and its processor (float16 on disk; float32 is the
    fastest on a CPU)."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = folder or MODELS[name]
    model = LlavaForConditionalGeneration.from_pretrained(
        folder,
        dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
        attn_implementation=attn_implementation,
    )
    return model.to(device).eval(), AutoProcessor.from_pretrained(folder)


def prompt(processor: ProcessorMixin, question: str) -> str:
    """The question in the model's chat template, with the image's placeholder."""
    return chat_prompt(processor, question)


def is_correct(prediction: str, answer: str) -> bool:
    """Every word right, in the right order; case and spacing aside."""
    return prediction.lower().split() == answer.lower().split()
